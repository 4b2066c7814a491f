"""Per-host limits of http(s) requests: adaptive request slots, pauses and a circuit breaker.

A host is the name and port that a request is sent to, after any redirects.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator

from pipelines import metrics
from pipelines.fetch.retry import FetchError
from pipelines.fetch.settings import FetchLimits
from pipelines.status import Status

MAX_HOSTS = 10_000
"""Hosts remembered; beyond that, idle ones are forgotten, but for half as many that failed last."""

GRACE_S = 15.0
"""How long a host must have failed before its circuit opens, seconds: retries outlast shorter outages."""

PROBE_INTERVAL_S = 30.0
"""Time between the requests that are let through an open circuit, seconds."""

MAX_PAUSE_S = 10.0
"""Longest pause that an overloaded host gets without asking for one, seconds."""

OVERLOAD_STATUSES = frozenset({Status.THROTTLED, Status.SERVER_ERROR})
"""Answers that slow the host's requests down."""

BREAKER_STATUSES = OVERLOAD_STATUSES | {Status.CONNECTION_FAILED, Status.TLS_FAILED, Status.TIMEOUT}
"""Failures of the host rather than of one object."""


TURN_S = 1.0
"""A load actor's turn at a host that has more of them than slots, seconds: a few requests' time."""


class AdaptiveSlots:
    """Up to `most` slots: halved when the host is overloaded, one more for each round without (AIMD)."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = float(most)
        self._free = asyncio.Semaphore(most)
        self._withheld = 0

    @contextlib.asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        await self._free.acquire()
        try:
            yield
        finally:
            self._withheld += 1
            while self._withheld > self._most - int(self._limit):
                self._withheld -= 1
                self._free.release()

    def decrease(self) -> None:
        self._limit = max(1.0, self._limit / 2)

    def increase(self) -> None:
        self._limit = min(float(self._most), self._limit + 1 / self._limit)


class CircuitOpen(FetchError):
    """The host failed too often: the request was not made."""


class Host:
    """Per-host state: request slots, end of the current pause, circuit breaker."""

    def __init__(self, limits: FetchLimits, load_actors: int = 1) -> None:
        self._limits = limits
        self._slots = AdaptiveSlots(max(1, limits.per_host // load_actors))
        self._turns = -(-load_actors // limits.per_host)
        self._turn = random.randrange(self._turns)
        self._users = 0
        self._resume_at = 0.0
        self._slowed_at = 0.0
        self._slowdowns = 0
        self._failures = 0
        self._failing_since = 0.0
        self._last_error: FetchError | None = None
        self._probe_at = 0.0

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold one request slot, after any pause.

        Raises:
            CircuitOpen: the host failed too often.
            FetchError: its Retry-After is longer than an object's total time-out.
        """
        self._users += 1
        try:
            async with self._slots.hold():
                while pause_s := max(self._pause_s(), self._turn_s()):
                    await asyncio.sleep(pause_s)
                self._check_circuit()
                yield
        finally:
            self._users -= 1

    @contextlib.contextmanager
    def record(self, timeout: asyncio.Timeout) -> Iterator[None]:
        """Update the host's state with the outcome of one request."""
        began = _now()
        try:
            yield
        except FetchError as error:
            if error.status in OVERLOAD_STATUSES and began >= self._slowed_at:
                self._slow_down()
            self._record_error(error)
            raise
        except asyncio.CancelledError:
            if timeout.expired():
                self._record_error(FetchError(Status.TIMEOUT, "not complete within the total time-out"))
            raise
        else:
            self._failures = self._slowdowns = 0
            self._slots.increase()

    def is_busy(self) -> bool:
        """Whether it has requests in flight or a pause."""
        return self._users > 0 or self._resume_at > _now()

    def has_failed(self) -> bool:
        """Whether its last request failed."""
        return self._failures > 0

    def _slow_down(self) -> None:
        """Halve the slots; from the second time in a row also pause, each time twice as long.

        Requests already in flight then change nothing: many failures at once are one overload.
        """
        self._slots.decrease()
        self._slowdowns += 1
        self._slowed_at = _now()
        if self._slowdowns > 1:
            pause_s = self._limits.backoff_s * 2 ** min(self._slowdowns - 2, 10)
            pause_s = min(pause_s, MAX_PAUSE_S, self._limits.total_timeout_s)
            self._resume_at = max(self._resume_at, _now() + pause_s)

    def _record_error(self, error: FetchError) -> None:
        if error.retry_after_s:
            self._resume_at = max(self._resume_at, _now() + error.retry_after_s)
        if error.status not in BREAKER_STATUSES:
            self._failures = 0
            return
        if not self._failures:
            self._failing_since = _now()
        self._failures += 1
        if self._failures == self._limits.breaker_failures:
            metrics.count("hosts_given_up")
        self._last_error = error

    def _check_circuit(self) -> None:
        if self._failures < self._limits.breaker_failures or self._last_error is None:
            return
        if _now() < self._failing_since + GRACE_S:
            return
        if _now() >= self._probe_at:
            self._probe_at = _now() + PROBE_INTERVAL_S
            return
        raise CircuitOpen(
            self._last_error.status,
            f"not tried: the host failed {self._failures} times in a row (--fetch.breaker-failures is "
            f"{self._limits.breaker_failures}), last with {self._last_error.error}",
            final=True,
        )

    def _turn_s(self) -> float:
        """Time until this load actor's turn, which was drawn at random."""
        since_s = (_now() - self._turn * TURN_S) % (self._turns * TURN_S)
        return 0.0 if since_s < TURN_S else self._turns * TURN_S - since_s

    def _pause_s(self) -> float:
        pause_s = max(0.0, self._resume_at - _now())
        if pause_s > self._limits.total_timeout_s:
            error = f"not tried: the host's Retry-After has {pause_s:.0f} s left"
            raise FetchError(Status.THROTTLED, error, retry_after_s=pause_s, final=True)
        return pause_s


class Hosts:
    """Recently contacted hosts, at most MAX_HOSTS and those in use."""

    def __init__(self, limits: FetchLimits, load_actors: int = 1) -> None:
        self._limits = limits
        self._load_actors = load_actors
        self._known: dict[tuple[str, int], Host] = {}

    def get(self, name: str, port: int) -> Host:
        """The host; a new one if it is not remembered."""
        key = (name.lower().rstrip("."), port)
        if key not in self._known:
            if len(self._known) >= MAX_HOSTS:
                self._forget()
            self._known[key] = Host(self._limits, self._load_actors)
        return self._known[key]

    def _forget(self) -> None:
        """Keep the hosts in use, and of the others the newest whose last request failed."""
        busy = {key: host for key, host in self._known.items() if host.is_busy()}
        failed = [key for key, host in self._known.items() if key not in busy and host.has_failed()]
        self._known = {key: self._known[key] for key in failed[-MAX_HOSTS // 2 :]} | busy


def _now() -> float:
    return asyncio.get_running_loop().time()
