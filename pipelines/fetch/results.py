"""Outcomes from many threads and one event loop -> batches for the one caller that waits for them.

A caller may stop listening in the middle: what arrives afterwards gives its memory back and is gone.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")

BATCH_BYTES = 8 << 20
"""Payloads handed over together, about: half a second of decoding, and little beside the budget."""

LINGER_S = 0.05
"""Longest wait for a batch to fill, seconds: its caller holds memory meanwhile that others may wait for."""


@dataclass(frozen=True, slots=True)
class Arrival(Generic[T]):
    """A finished object on its way to the consumer."""

    index: int
    outcome: T | Exception
    """An exception is a mistake of ours: it is raised where the consumer is, instead of stalling it."""
    held_bytes: int = 0
    """To be given back to the budget when the object was consumed."""


class Delivery(Generic[T]):
    """What one caller waits for; after `abandon`, late arrivals only give their memory back."""

    def __init__(self, give_back: Callable[[int], object]) -> None:
        self.tasks: list[asyncio.Task[None]] = []
        self._give_back = give_back
        self._arrived: SimpleQueue[Arrival[T]] = SimpleQueue()
        self._abandoned = False

    def put(self, arrival: Arrival[T]) -> None:
        self._arrived.put(arrival)
        if self._abandoned:
            self._drain()

    def take(self, most: int) -> list[Arrival[T]]:
        """Wait for an arrival, and a moment for up to `most` of them."""
        batch = [self._arrived.get()]
        n_bytes, until = batch[0].held_bytes, time.monotonic() + LINGER_S
        with contextlib.suppress(Empty):
            while len(batch) < most and n_bytes < BATCH_BYTES:
                batch.append(self._arrived.get(timeout=max(0.0, until - time.monotonic())))
                n_bytes += batch[-1].held_bytes
        return batch

    def consumed(self, batch: list[Arrival[T]]) -> None:
        n_bytes = sum(arrival.held_bytes for arrival in batch)
        batch.clear()
        self._give_back(n_bytes)

    def abandon(self) -> None:
        """Called on the event loop."""
        self._abandoned = True
        for task in self.tasks:
            task.cancel()
        self._drain()

    def _drain(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                self.consumed([self._arrived.get_nowait()])
