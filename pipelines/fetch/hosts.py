"""Web hosts -> how many requests each may be sent at once, and whether it may be sent one now.

A host is a name and a port: the one that a request goes to, after whatever redirects. It makes no request.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

from pipelines.fetch.retry import Failure
from pipelines.specs import FetchLimits
from pipelines.status import Status

MAX_HOSTS = 10_000
"""Hosts remembered before those are forgotten that are not in use; half as many that failed are kept."""

GRACE_S = 15.0
"""How long a host must have failed to be given up, seconds: less is outlasted by an object's own attempts."""

PROBE_EVERY_S = 30.0
"""How often a host that failed too often is asked again, seconds."""


class Host:
    """One web host: its places, until when it asked for peace, and whether it answers at all."""

    def __init__(self, limits: FetchLimits) -> None:
        self._limits = limits
        self._places = asyncio.Semaphore(limits.per_host)
        self._users = 0
        self._resume_at = 0.0
        self._failures = 0
        self._failing_since = 0.0
        self._last: Failure | None = None
        self._probe_at = 0.0

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """One of its requests at a time, once its peace is over.

        Raises:
            Failure: the host asked for a longer peace than an object may take, or has failed too often.
        """
        self._users += 1
        try:
            async with self._places:
                self._refuse_dead()
                if pause_s := self._pause_s():
                    await asyncio.sleep(pause_s)
                yield
        finally:
            self._users -= 1

    @contextlib.contextmanager
    def watched(self, timeout: asyncio.Timeout) -> Iterator[None]:
        """Learn from what becomes of one request."""
        try:
            yield
        except Failure as failure:
            self._learn(failure)
            raise
        except asyncio.CancelledError:
            if timeout.expired():
                self._learn(Failure(Status.TIMEOUT, "not complete within the total time-out"))
            raise
        else:
            self._failures = 0

    def is_busy(self) -> bool:
        """Whether it is being asked right now, or may not be."""
        return self._users > 0 or self._resume_at > asyncio.get_running_loop().time()

    def has_failed(self) -> bool:
        """Whether its last request did."""
        return self._failures > 0

    def _learn(self, failure: Failure) -> None:
        now = asyncio.get_running_loop().time()
        if failure.retry_after_s:
            self._resume_at = max(self._resume_at, now + failure.retry_after_s)
        if failure.status not in (Status.CONNECTION_FAILED, Status.TIMEOUT):
            self._failures = 0
            return
        if not self._failures:
            self._failing_since = now
        self._failures += 1
        self._last = failure

    def _refuse_dead(self) -> None:
        if self._failures < self._limits.host_failures or self._last is None:
            return
        now = asyncio.get_running_loop().time()
        if now < self._failing_since + GRACE_S:
            return
        if now >= self._probe_at:
            self._probe_at = now + PROBE_EVERY_S
            return
        raise Failure(
            self._last.status,
            f"not tried: the host failed {self._failures} times in a row (--fetch.host-failures is "
            f"{self._limits.host_failures}), last with {self._last.error}",
            final=True,
        )

    def _pause_s(self) -> float:
        pause_s = max(0.0, self._resume_at - asyncio.get_running_loop().time())
        if pause_s > self._limits.total_timeout_s:
            error = f"the host asked for {pause_s:.0f} s without requests"
            raise Failure(Status.THROTTLED, error, final=True)
        return pause_s


class Hosts:
    """Every host asked of late."""

    def __init__(self, limits: FetchLimits) -> None:
        self._limits = limits
        self._known: dict[tuple[str, int], Host] = {}

    def of(self, name: str, port: int) -> Host:
        """The host; new if nothing is known of it."""
        key = (name.lower().rstrip("."), port)
        if key not in self._known:
            if len(self._known) >= MAX_HOSTS:
                self._forget()
            self._known[key] = Host(self._limits)
        return self._known[key]

    def _forget(self) -> None:
        """Keep the hosts in use, and of the others the newest whose last request failed."""
        busy = {key: host for key, host in self._known.items() if host.is_busy()}
        failed = [key for key, host in self._known.items() if key not in busy and host.has_failed()]
        self._known = {key: self._known[key] for key in failed[-MAX_HOSTS // 2 :]} | busy
