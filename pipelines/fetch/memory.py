"""Bounds the bytes of payloads in memory, from the first one received until the caller is done with them.

Bodies of up to `SMALL_BYTES` share one half of `max_buffered_bytes`, larger ones the other, both first come
first served. A body of known size reserves it at once; a streamed one starts as a small body, and reserves
its full size among the large ones when it outgrows that. A body waits for the small half first and for the
large half last, so that none can deadlock, and slow large bodies do not hold up small ones.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future

from pipelines.fetch.retry import FetchError
from pipelines.fetch.settings import FetchLimits
from pipelines.status import Status

SMALL_BYTES = 1 << 20
"""Nearly all web images are smaller, and the default small half holds 256 of these: twice the concurrency."""


@contextlib.contextmanager
def paused(timeout: asyncio.Timeout | None) -> Iterator[None]:
    """Stop an object's clock while it waits for us: for a slot, its host's pause or memory."""
    deadline = timeout.when() if timeout else None
    if timeout is None or deadline is None:
        yield
        return
    clock = asyncio.get_running_loop().time
    began = clock()
    timeout.reschedule(None)
    try:
        yield
    finally:
        timeout.reschedule(deadline + clock() - began)


class ByteBudget:
    """A number of bytes, acquired first come first served, by threads and by tasks of any event loop."""

    def __init__(self, n_bytes: int) -> None:
        self._free = n_bytes
        self._waiting: deque[tuple[int, Future[None]]] = deque()
        self._lock = threading.Lock()

    def try_acquire(self, n_bytes: int) -> bool:
        """Acquire the bytes if that needs no waiting; returns whether it did."""
        with self._lock:
            if self._waiting or n_bytes > self._free:
                return False
            self._free -= n_bytes
            return True

    def acquire(self, n_bytes: int) -> None:
        """Wait for the bytes, in a thread."""
        self._enqueue(n_bytes).result()

    async def acquire_async(self, n_bytes: int) -> None:
        """Wait for the bytes, in a task."""
        turn = self._enqueue(n_bytes)
        try:
            await asyncio.wrap_future(turn)
        except asyncio.CancelledError:
            self.release(0 if turn.cancel() else n_bytes)  # 0: lets in those that waited behind this one
            raise

    def release(self, n_bytes: int) -> None:
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

    def _enqueue(self, n_bytes: int) -> Future[None]:
        turn: Future[None] = Future()
        with self._lock:
            self._waiting.append((n_bytes, turn))
        self.release(0)
        return turn


class Memory:
    """The two halves of `max_buffered_bytes`."""

    def __init__(self, limits: FetchLimits) -> None:
        large = max(limits.max_bytes, limits.max_buffered_bytes // 2)
        small = limits.max_buffered_bytes - large
        self.max_bytes = limits.max_bytes
        self.small_bytes = min(SMALL_BYTES, small, limits.max_bytes)
        """Largest body that counts as small."""
        self._small, self._large = ByteBudget(small), ByteBudget(large)

    def budget_for(self, n_bytes: int) -> ByteBudget:
        """The half that a body of this size belongs to. Raises FetchError (`too_large`)."""
        check_size(n_bytes, self.max_bytes)
        return self._small if n_bytes <= self.small_bytes else self._large


class Reservation:
    """The memory of one payload; released when the caller is done with it."""

    def __init__(self, memory: Memory, timeout: asyncio.Timeout | None = None) -> None:
        self.n_bytes = 0
        self._memory = memory
        self._timeout = timeout
        self._budget = memory.budget_for(0)

    def try_reserve(self, n_bytes: int) -> bool:
        """Reserve the whole payload if that needs no waiting. Raises FetchError (`too_large`)."""
        budget = self._memory.budget_for(n_bytes)
        return budget.try_acquire(n_bytes) and self._hold(budget, n_bytes)

    def reserve_blocking(self, n_bytes: int) -> None:
        """Reserve the whole payload, waiting in this thread. Raises FetchError (`too_large`)."""
        if not self.try_reserve(n_bytes):
            budget = self._memory.budget_for(n_bytes)
            budget.acquire(n_bytes)
            self._hold(budget, n_bytes)

    async def reserve(self, n_bytes: int) -> None:
        """Reserve the whole payload; waiting does not count as the object's time. Raises FetchError."""
        if not self.try_reserve(n_bytes):
            budget = self._memory.budget_for(n_bytes)
            with paused(self._timeout):
                await budget.acquire_async(n_bytes)
            self._hold(budget, n_bytes)

    async def reserve_stream(self, received: int, expected: int | None) -> None:
        """Reserve memory for a body of which `received` bytes have come, and `expected` were announced.

        A size that a server claims is reserved only when more than a small body has really arrived.
        Raises FetchError (`too_large`).
        """
        check_size(max(received, expected or 0), self._memory.max_bytes)
        if not received:
            small = self._memory.small_bytes
            await self.reserve(small if expected is None else min(expected, small))
        elif received > self.n_bytes:
            await self.reserve(self._memory.max_bytes if expected is None else expected)

    def shrink(self, n_bytes: int) -> None:
        """Keep at most this much."""
        if n_bytes < self.n_bytes:  # else the lock would be taken for nothing
            self._budget.release(self.n_bytes - n_bytes)
            self.n_bytes = n_bytes

    def release(self) -> None:
        """Keep nothing."""
        self.shrink(0)

    def _hold(self, budget: ByteBudget, n_bytes: int) -> bool:
        self.release()
        self._budget, self.n_bytes = budget, n_bytes
        return True


def check_size(n_bytes: int, max_bytes: int) -> None:
    """Raise FetchError (`too_large`) for an object over the limit."""
    if n_bytes > max_bytes:
        limit = f"{max_bytes:,} bytes (--fetch.max-bytes)"
        raise FetchError(Status.TOO_LARGE, f"{n_bytes:,} bytes, over the limit of {limit}")
