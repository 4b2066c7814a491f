"""What one request came to, and when the next one may be made: pure arithmetic over statuses and delays."""

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from pipelines.schema import TRANSIENT, Status

BACKOFF_FACTOR = 2.5
"""Four attempts 1, 2.5 and 6 seconds apart outlast the usual hiccup without holding a place for long."""

SMALL_BYTES = 256 << 10
"""Objects up to this size are bounded by the number of requests alone and reserve nothing."""

STATUS_OF_CODE = {
    401: Status.DENIED,
    403: Status.DENIED,
    404: Status.NOT_FOUND,
    408: Status.TIMEOUT,
    410: Status.NOT_FOUND,
    425: Status.THROTTLED,
    429: Status.THROTTLED,
    451: Status.DENIED,
}


class Failure(Exception):
    """One request did not bring the object's bytes; becomes a row's status, never leaves fetching."""

    def __init__(
        self, status: Status, error: str, *, retry_after_s: float | None = None, final: bool = False
    ) -> None:
        super().__init__(error)
        self.status = status
        self.error = error
        self.retry_after_s = retry_after_s
        self.final = final or status not in TRANSIENT


def status_of_code(code: int) -> Status:
    """The row's status for an HTTP status code that is not a success."""
    if code >= 500:
        return Status.SERVER_ERROR
    return STATUS_OF_CODE.get(code, Status.HTTP_ERROR)


def backoff_s(attempt: int, backoff_base_s: float, jitter: float) -> float:
    """Wait after attempt 1, 2, …; `jitter` in [0, 1) spreads it over half to one and a half times that."""
    return float(backoff_base_s * BACKOFF_FACTOR ** (attempt - 1) * (0.5 + jitter))


def retry_after_s(header: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a `Retry-After` header asks for: a number or a date (RFC 9110, 10.2.3), else None."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(header)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - (now or datetime.now(UTC))).total_seconds())


@contextlib.contextmanager
def paused(timeout: asyncio.Timeout) -> Iterator[None]:
    """Stop a request's clock while it waits for something of ours: a slot, a pause of its host, memory."""
    clock = asyncio.get_running_loop().time
    deadline, began = timeout.when(), clock()
    timeout.reschedule(None)
    yield
    if deadline is not None:
        timeout.reschedule(deadline + clock() - began)


class ByteBudget:
    """Bounds the bytes of large objects in memory, first come first served; lives on one event loop."""

    def __init__(self, max_bytes: int) -> None:
        self._free = max_bytes
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    async def take(self, n_bytes: int) -> None:
        if self._waiting or n_bytes > self._free:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append((n_bytes, turn))
            try:
                await turn
            except asyncio.CancelledError:
                self._abandon(n_bytes, turn)
                raise
        else:
            self._free -= n_bytes

    def give(self, n_bytes: int) -> None:
        self._free += n_bytes
        while self._waiting and self._waiting[0][0] <= self._free:
            wanted, turn = self._waiting.pop(0)
            if not turn.done():
                self._free -= wanted
                turn.set_result(None)

    def _abandon(self, n_bytes: int, turn: asyncio.Future[None]) -> None:
        if turn.done() and not turn.cancelled():
            self.give(n_bytes)
        else:
            self._waiting = [(wanted, other) for wanted, other in self._waiting if other is not turn]
            self.give(0)


@dataclass
class Reservation:
    """One request's share of the budget and of its time; waiting for bytes costs it no time."""

    budget: ByteBudget
    timeout: asyncio.Timeout
    max_bytes: int
    held: int = 0

    async def cover(self, received: int, expected: int | None) -> None:
        """Make sure that `received` bytes may be held; called before memory grows beyond a small object.

        Raises Failure (`too_large`).
        """
        if max(received, expected or 0) > self.max_bytes:
            size = f"{expected:,} bytes" if expected and expected > self.max_bytes else "more"
            raise Failure(
                Status.TOO_LARGE, f"{size}, over the limit of {self.max_bytes:,} bytes (--fetch.max-bytes)"
            )
        if self.held or max(received, expected or 0) <= SMALL_BYTES:
            return
        # Once and in full: whoever holds a share never waits for more, so that shares cannot deadlock.
        wanted = expected if expected and received <= expected else self.max_bytes
        with paused(self.timeout):
            await self.budget.take(wanted)
        self.held = wanted

    def shrink(self, n_bytes: int) -> None:
        """Keep only what the payload takes."""
        kept = min(self.held, n_bytes)
        self.budget.give(self.held - kept)
        self.held = kept

    def release(self) -> None:
        self.shrink(0)
