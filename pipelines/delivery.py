"""Outcomes from many threads and one event loop -> the one caller that waits for them.

A caller may stop listening in the middle: what arrives afterwards gives its memory back and is gone.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Arrival(Generic[T]):
    """A finished object on its way to the consumer."""

    index: int
    outcome: T | Exception
    """An exception is a mistake of ours: it is raised where the consumer is, instead of stalling it."""
    held_bytes: int = 0
    """To be given back to the budget when the object was consumed."""


class Delivery(Generic[T]):
    """What one `fetch_many` waits for; after `abandon`, late arrivals only give their memory back."""

    def __init__(self, give_back: Callable[[int], object]) -> None:
        self.tasks: list[asyncio.Task[None]] = []
        self._give_back = give_back
        self._arrived: SimpleQueue[Arrival[T]] = SimpleQueue()
        self._abandoned = False

    def put(self, arrival: Arrival[T]) -> None:
        self._arrived.put(arrival)
        if self._abandoned:
            self._drain()

    def take(self) -> Arrival[T]:
        return self._arrived.get()

    def consumed(self, arrival: Arrival[T]) -> None:
        if arrival.held_bytes:
            self._give_back(arrival.held_bytes)

    def abandon(self) -> None:
        """Called on the event loop."""
        self._abandoned = True
        for task in self.tasks:
            task.cancel()
        self._drain()

    def _drain(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                self.consumed(self._arrived.get_nowait())
