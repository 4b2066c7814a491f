"""Runs the dataflow pass after pass, and makes each written part count.

The dataset is consumed in a thread: the main thread stays free to hear signals, to write the ledger on
time and to notice a rival, also while nothing arrives.
"""

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from pipelines import metrics
from pipelines.ledger.item_set import count
from pipelines.ledger.ledger import Ledger, LedgerLost
from pipelines.ledger.parts import Committer, WriteResult, read_result
from pipelines.messages import JobFailed, Stopped
from pipelines.status import Status

log = logging.getLogger(__name__)

Arrival = WriteResult | BaseException | None
"""A part, the error that ended the dataflow, or None at its end."""


class Progress(Protocol):
    """What shows how far the run is; entered for its duration."""

    def __enter__(self) -> object: ...

    def __exit__(self, *error: object) -> None: ...

    def advance(self, images: int, errors: int) -> None:
        """So many more images are recorded, among their rows so many without a label."""

    def defer(self, images: int) -> None:
        """So many images are deferred to a later pass."""

    def show(self) -> None:
        """Update the display when it is time to."""


@dataclass(frozen=True)
class Passes:
    """How often failures that may pass are tried again."""

    later: int
    """Passes after the first; the last one records passing failures too."""
    pause_s: float
    """Wait before each later pass, seconds."""


def run_passes(
    ledger: Ledger,
    committer: Committer,
    passes: Passes,
    dataflow: Callable[[bool], Iterable[pa.Table]],
    *,
    progress: Progress,
) -> None:
    """Run until every item is recorded.

    Args:
        dataflow: classifies what the ledger misses and yields a row per written part; its argument says
            whether this pass is final.

    Raises:
        JobFailed: asked to stop, or a final pass recorded nothing new. What was recorded is kept.
        LedgerLost: another driver has taken over.
    """
    with progress, flushed(committer):
        try:
            for number in itertools.count():
                before = len(ledger.done)
                for written in arrivals(dataflow(number >= passes.later), every_s=committer.interval_s):
                    take(written, committer, progress)
                committer.flush()
                if ledger.done.full:
                    return
                left = ledger.done.n_items - len(ledger.done)
                if number >= passes.later and len(ledger.done) == before:
                    raise JobFailed(
                        f"{left:,} images did not finish in a full pass; run the same command again"
                    )
                log.info("trying %s images again", f"{left:,}")
                time.sleep(passes.pause_s)
        except Stopped as stop:
            committer.flush()
            raise JobFailed(
                f"stopped by {stop}; {len(ledger.done):,} of {ledger.done.n_items:,} images are recorded, "
                "and the same command continues"
            ) from None


@contextlib.contextmanager
def flushed(committer: Committer) -> Iterator[None]:
    """Record what is pending whatever ends the run: written parts are paid for."""
    try:
        yield
    except (LedgerLost, JobFailed):
        raise
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            committer.flush()
        raise


def take(written: WriteResult | None, committer: Committer, progress: Progress) -> None:
    """One arrival into the ledger and onto the screen; None is the clock's."""
    kept = committer.add(written.part) if written and written.part else None
    if kept:
        for status, rows in kept.statuses.items():
            metrics.count("rows", rows, status=status)
        progress.advance(count(kept.items), kept.rows - kept.statuses.get(Status.OK.value, 0))
    if written:
        progress.defer(count(written.deferred))
    committer.tick()
    progress.show()


def arrivals(written: Iterable[pa.Table], *, every_s: float) -> Iterator[WriteResult | None]:
    """Every written part as it comes, and None whenever `every_s` seconds passed without one."""
    arrived: queue.Queue[Arrival] = queue.Queue()
    stop = threading.Event()
    threading.Thread(target=consume, args=(written, arrived, stop), name="consume", daemon=True).start()
    try:
        while True:
            try:
                arrival = arrived.get(timeout=every_s)
            except queue.Empty:
                yield None
                continue
            if arrival is None:
                return
            if isinstance(arrival, BaseException):
                raise arrival
            yield arrival
    finally:
        stop.set()


def consume(written: Iterable[pa.Table], arrived: "queue.Queue[Arrival]", stop: threading.Event) -> None:
    try:
        for batch in written:
            if stop.is_set():
                return
            for row in batch.to_pylist():
                arrived.put(read_result(row))
        arrived.put(None)
    except BaseException as error:  # raised again where the run is driven
        arrived.put(error)
