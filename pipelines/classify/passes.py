"""Runs the dataflow pass after pass, and makes each written part count.

The dataset is consumed in a thread: the main thread stays free to hear signals, to write the ledger on
time and to notice a rival, also while nothing arrives.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from pipelines import metrics
from pipelines.classify.settings import Passes
from pipelines.classify.sizing import ClusterChanged
from pipelines.ledger.item_set import Range, Ranges, count, ranges_of
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


@dataclass
class Tally:
    """What one pass did."""

    recorded: int = 0
    deferred: int = 0
    resume_at: float = 0.0
    """When the last of the servers that asked for a pause may be asked again, by the monotonic clock."""

    def add(self, written: WriteResult) -> None:
        self.recorded += count(written.part.items) if written.part else 0
        self.deferred += count(written.deferred)
        if written.retry_after_s:
            self.resume_at = max(self.resume_at, time.monotonic() + written.retry_after_s)

    def shows_outage(self, n_items: int) -> bool:
        """Whether nearly everything that was tried failed, and that is a share of all that matters."""
        many = max(FEWEST_IN_OUTAGE, n_items * SHARE_IN_OUTAGE)
        return self.deferred >= many and self.recorded < 0.1 * self.deferred


FEWEST_IN_OUTAGE = 20
SHARE_IN_OUTAGE = 0.05
PROBES = 16
"""Images that are tried to find out whether an outage is over."""
PROBE_EVERY_S = 10.0
TOLERATED = 0.1
"""Share of a batch that may fail for rejected credentials: more is no matter of single objects."""

Dataflow = Callable[[Sequence[Range], bool], Iterable[pa.Table]]


def run_passes(
    ledger: Ledger, committer: Committer, passes: Passes, dataflow: Dataflow, *, progress: Progress
) -> None:
    """Run until every item is recorded.

    Args:
        dataflow: classifies items and yields a row per written part; its second argument says whether
            passing failures are recorded too.

    Raises:
        JobFailed: asked to stop, the credentials are rejected, or a final pass recorded nothing new. What
            was recorded is kept.
        LedgerLost: another driver has taken over.
    """

    def run_pass(items: Sequence[Range], final: bool) -> Tally:
        tally = Tally()
        for written in arrivals(dataflow(items, final), every_s=committer.interval_s):
            take(written, committer, progress)
            if written:
                tally.add(written)
        committer.flush()
        return tally

    metrics.count("rows", 0, status=Status.OK.value)
    number = 0
    with progress, _keeping_work(ledger, committer):
        while not ledger.done.full:
            before, final = len(ledger.done), number >= passes.retry_passes
            try:
                tally = run_pass(ledger.done.missing(), final)
            except ClusterChanged as change:
                committer.flush()
                if len(ledger.done) == before:
                    raise
                log.warning("%s", change)
                continue
            if ledger.done.full:
                return
            left = ledger.done.n_items - len(ledger.done)
            if final and len(ledger.done) == before:
                raise JobFailed(f"{left:,} images did not finish in a full pass; run the same command again")
            log.info("trying %s images again", f"{left:,}")
            number += 1
            wait_for_servers(tally, passes, number, ledger, run_pass)


def wait_for_servers(
    tally: Tally, passes: Passes, number: int, ledger: Ledger, run_pass: Callable[..., Tally]
) -> None:
    """Wait before the next pass; before the last one, as long as servers ask for or an outage lasts."""
    asked_s = min(tally.resume_at - time.monotonic(), passes.outage_wait_s)
    if asked_s > passes.retry_pause_s:
        log.info("waiting %.0f s, as a server asked for", asked_s)
    time.sleep(max(passes.retry_pause_s, asked_s))
    if number < passes.retry_passes or not tally.shows_outage(ledger.done.n_items):
        return
    deadline = time.monotonic() + passes.outage_wait_s
    log.warning(
        "nearly every request of the last pass failed: waiting up to %g s (--outage-wait-s) for the end of "
        "an outage before failures are recorded",
        passes.outage_wait_s,
    )
    while not run_pass(_sample(ledger.done.missing()), False).recorded and not ledger.done.full:
        if time.monotonic() >= deadline:
            return
        time.sleep(min(PROBE_EVERY_S, max(0.0, deadline - time.monotonic())))


def _sample(missing: Ranges) -> Sequence[Range]:
    """A few of the items, spread over all of them."""
    starts, stops = missing.bounds.T
    ends = np.cumsum(stops - starts)
    chosen = np.unique(np.linspace(0, ends[-1] - 1, PROBES).astype(int))
    owner = np.searchsorted(ends, chosen, side="right")
    return ranges_of(stops[owner] - (ends[owner] - chosen))


@contextlib.contextmanager
def _keeping_work(ledger: Ledger, committer: Committer) -> Iterator[None]:
    """Record what is pending whatever ends the run: written parts are paid for."""
    try:
        yield
    except (LedgerLost, JobFailed):
        raise
    except Stopped as stop:
        committer.flush()
        raise JobFailed(
            f"stopped by {stop}; {len(ledger.done):,} of {ledger.done.n_items:,} images are recorded, "
            "and the same command continues"
        ) from None
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            committer.flush()
        raise


def take(written: WriteResult | None, committer: Committer, progress: Progress) -> None:
    """One arrival into the ledger and onto the screen; None is the clock's."""
    if written:
        _refuse_rejected_credentials(written, committer)
    kept = committer.add(written.part) if written and written.part else None
    if kept:
        for status, rows in kept.statuses.items():
            metrics.count("rows", rows, status=status)
        progress.advance(count(kept.items), kept.rows - kept.statuses.get(Status.OK.value, 0))
    if written:
        progress.defer(count(written.deferred))
    committer.tick()
    progress.show()


def _refuse_rejected_credentials(written: WriteResult, committer: Committer) -> None:
    """Raise JobFailed before rows are recorded whose objects nothing is wrong with."""
    status = Status.CREDENTIALS_FAILED.value
    statuses = written.part.statuses if written.part else {}
    rejected = statuses.get(status, 0) + written.reasons.get(status, 0)
    tried = sum(statuses.values()) + sum(written.reasons.values())
    if rejected > TOLERATED * tried:
        committer.flush()
        raise JobFailed(
            f"the object store rejected our credentials or our clock for {rejected:,} of {tried:,} images. "
            "Renew the credentials in the environment, or set the clock of every node; the same command "
            "then continues"
        )


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
