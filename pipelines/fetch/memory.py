"""Memory for payloads, shared fairly, and the clock that stands still while a request waits for it."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from pipelines.fetch.retry import Failure
from pipelines.status import Status

SMALL_BYTES = 256 << 10
"""Reserved for an object of unknown size, until it proves larger: then as much as the largest may take."""


@contextlib.contextmanager
def paused(timeout: asyncio.Timeout) -> Iterator[None]:
    """Stop a request's clock while it waits for something of ours: a slot, a pause of its host, memory."""
    clock = asyncio.get_running_loop().time
    deadline, began = timeout.when(), clock()
    timeout.reschedule(None)
    try:
        yield
    finally:
        if deadline is not None:
            timeout.reschedule(deadline + clock() - began)


class ByteBudget:
    """Bounds the bytes of payloads in memory, first come first served; for any thread and event loop."""

    def __init__(self, max_bytes: int) -> None:
        self._free = max_bytes
        self._waiting: deque[tuple[int, Future[None]]] = deque()
        self._lock = threading.Lock()

    def take_now(self, n_bytes: int) -> bool:
        """Take the bytes if that needs no waiting; whether it did."""
        with self._lock:
            if self._waiting or n_bytes > self._free:
                return False
            self._free -= n_bytes
            return True

    def take(self, n_bytes: int) -> None:
        """Wait for the bytes, in a thread that holds none."""
        self._turn(n_bytes).result()

    async def take_async(self, n_bytes: int) -> None:
        """Wait for the bytes, in a task that holds none."""
        turn = self._turn(n_bytes)
        try:
            await asyncio.wrap_future(turn)
        except asyncio.CancelledError:
            if turn.cancel():
                self.give(0)  # whoever waited behind this one
            else:
                self.give(n_bytes)
            raise

    def give(self, n_bytes: int) -> None:
        """Return bytes, and let in those whose turn it is."""
        granted = []
        with self._lock:
            self._free += n_bytes
            while self._waiting and (self._waiting[0][0] <= self._free or self._waiting[0][1].cancelled()):
                wanted, turn = self._waiting.popleft()
                if turn.set_running_or_notify_cancel():
                    self._free -= wanted
                    granted.append(turn)
        for turn in granted:
            turn.set_result(None)

    def _turn(self, n_bytes: int) -> Future[None]:
        turn: Future[None] = Future()
        with self._lock:
            self._waiting.append((n_bytes, turn))
        self.give(0)
        return turn


@dataclass
class Reservation:
    """One request's share of the budget and of its time; waiting for bytes costs it no time."""

    budget: ByteBudget
    timeout: asyncio.Timeout
    max_bytes: int
    held: int = 0

    async def cover(self, received: int, expected: int | None) -> None:
        """Make sure that `received` bytes may be held, and `expected` ones once they come.

        Raises Failure (`too_large`).
        """
        check_size(max(received, expected or 0), self.max_bytes)
        if expected is not None and received <= expected:
            wanted = expected
        else:
            wanted = min(SMALL_BYTES, self.max_bytes) if received <= SMALL_BYTES else self.max_bytes
        if wanted <= self.held:
            return
        # In full, and with nothing in hand: whoever holds a share never waits, so that none can deadlock.
        self.release()
        if not self.budget.take_now(wanted):
            with paused(self.timeout):
                await self.budget.take_async(wanted)
        self.held = wanted

    def shrink(self, n_bytes: int) -> None:
        """Keep only what the payload takes."""
        kept = min(self.held, n_bytes)
        self.budget.give(self.held - kept)
        self.held = kept

    def release(self) -> None:
        """Keep nothing."""
        self.shrink(0)


def check_size(n_bytes: int, max_bytes: int) -> None:
    """Raise Failure (`too_large`) for an object over the limit."""
    if n_bytes > max_bytes:
        limit = f"{max_bytes:,} bytes (--fetch.max-bytes)"
        raise Failure(Status.TOO_LARGE, f"{n_bytes:,} bytes, over the limit of {limit}")
