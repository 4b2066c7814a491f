"""Results from many threads and one event loop -> batches for the one caller that waits for them."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from pipelines.fetch.memory import Reservation
from pipelines.fetch.source import Fetched

BATCH_BYTES = 8 << 20
"""Payloads per batch, about: half a second of decoding, and little of the memory for payloads."""

LINGER_S = 0.05
"""Longest wait for a batch to fill, seconds: its payloads hold memory that others may wait for."""


@dataclass(frozen=True, slots=True)
class Result:
    """One fetched object, and the memory that it holds."""

    index: int
    fetched: Fetched | None
    """None if the fetcher was closed meanwhile."""
    reservation: Reservation


def done(results: Sequence[Result]) -> None:
    """Release the memory of results whose payloads are no longer used."""
    for result in results:
        result.reservation.release()


class ResultQueue:
    """The results that one caller waits for; after `cancel`, late ones only release their memory."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[None]] = set()
        """Requests under way."""
        self._results: SimpleQueue[Result] = SimpleQueue()
        self._cancelled = False

    def put(self, result: Result) -> None:
        self._results.put(result)
        if self._cancelled:
            self._drain()

    def take(self, most: int, timeout_s: float | None = None) -> list[Result]:
        """Wait for one result, and up to `LINGER_S` for `most` of them or `BATCH_BYTES`; [] if none comes."""
        try:
            batch = [self._results.get(timeout=timeout_s)]
        except Empty:
            return []
        n_bytes, until = batch[0].reservation.n_bytes, time.monotonic() + LINGER_S
        with contextlib.suppress(Empty):
            while len(batch) < most and n_bytes < BATCH_BYTES:
                batch.append(self._results.get(timeout=max(0.0, until - time.monotonic())))
                n_bytes += batch[-1].reservation.n_bytes
        return batch

    def cancel(self) -> None:
        """End the requests under way; called on the event loop."""
        self._cancelled = True
        for task in list(self.tasks):
            task.cancel()
        self._drain()

    def _drain(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                done([self._results.get_nowait()])
