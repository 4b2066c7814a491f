"""Memory for large objects, shared fairly, and the clock that stands still while a request waits for it."""

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.attempts import Failure
from pipelines.status import Status

SMALL_BYTES = 256 << 10
"""Objects up to this size are bounded by the number of requests alone and reserve nothing."""


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
        check_size(max(received, expected or 0), self.max_bytes)
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


def check_size(n_bytes: int, max_bytes: int) -> None:
    """Raise Failure (`too_large`) for an object over the limit."""
    if n_bytes > max_bytes:
        limit = f"{max_bytes:,} bytes (--fetch.max-bytes)"
        raise Failure(Status.TOO_LARGE, f"{n_bytes:,} bytes, over the limit of {limit}")
