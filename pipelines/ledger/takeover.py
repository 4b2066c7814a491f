"""One driver at a time on a run: a second one waits or refuses while the first is alive.

    state/driver.json    the running driver's last sign of life, rewritten before its lease ends

This only spares a running job: what keeps two drivers from doing damage is the ledger, whose next number
can be taken once. So a wrong guess here costs no row. The sign is a file of its own, not a ledger entry:
the ledger of a long night would otherwise grow while nothing is recorded, and a thread would write to it.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from pipelines.ledger.driver import Driver, is_running
from pipelines.ledger.entries import Phase
from pipelines.ledger.ledger import Ledger, LedgerLost
from pipelines.messages import first_line
from pipelines.storage.storage import Storage, open_storage

DRIVER_JSON = "driver.json"
SIGNS_PER_LEASE = 3
SIGN_PATIENCE_S = 5.0
"""How long a sign is tried on an object store that does not answer: it must not hold up the run's end."""
POLL_S = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sign:
    """The last that was heard of a driver."""

    at: datetime
    left: bool
    """It said that it ends."""


@contextmanager
def hold_run(ledger: Ledger, state: Storage, *, take_over: bool = False) -> Iterator[None]:
    """Be the run's only driver as far as one can see: wait for the previous one, then give signs of life.

    Args:
        take_over: replace the previous driver even if it is alive; it stops at its next entry.

    Raises:
        LedgerLost: another driver is alive.
    """
    wait_for_previous(ledger, state, take_over=take_over)
    ended, folder = threading.Event(), open_storage(state.uri, patience_s=SIGN_PATIENCE_S)
    signs = threading.Thread(target=_sign_until, args=(ended, ledger, folder), name="signs", daemon=True)
    signs.start()
    try:
        yield
    finally:
        ended.set()
        signs.join()
        _sign(ledger, folder, left=True)


def wait_for_previous(
    ledger: Ledger, state: Storage, *, take_over: bool = False, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Return once no other driver is at work on the run. Raises LedgerLost: one is."""
    if not ledger.state.driver or ledger.state.phase is Phase.PUBLISHED:
        return
    previous = Driver(**ledger.state.driver)
    sign = read_sign(ledger, state)
    running = False if sign.left else is_running(previous)
    if running is not False and take_over:
        log.warning("replacing the driver %s, last heard of at %s", previous, _format_time(sign))
    elif running:
        raise LedgerLost(_describe_running(previous, state, "its process runs"))
    elif running is None:
        _wait_out_lease(previous, sign, ledger, state, sleep)
    else:
        log.info("continuing the run of the driver %s, which has ended", previous)


def _wait_out_lease(
    previous: Driver, sign: Sign, ledger: Ledger, state: Storage, sleep: Callable[[float], None]
) -> None:
    """Wait until the driver's last sign is older than its lease. Raises LedgerLost at a newer sign."""
    left_s = min(previous.lease_s - (datetime.now(UTC) - sign.at).total_seconds(), previous.lease_s)
    if left_s > 0:
        log.warning(
            "the driver %s was last heard of at %s; waiting %.0f s for another sign (not with --take-over)",
            previous,
            _format_time(sign),
            left_s,
        )
    while left_s > 0:
        sleep(min(POLL_S, left_s))
        left_s -= POLL_S
        ledger.check()
        latest = read_sign(ledger, state)
        if latest.left:
            break
        if latest != sign:
            raise LedgerLost(_describe_running(previous, state, f"it gave a sign at {_format_time(latest)}"))
    log.warning("replacing the driver %s, last heard of at %s", previous, _format_time(sign))


def read_sign(ledger: Ledger, state: Storage) -> Sign:
    """The last sign of the driver that started last: its file, or the last entry if that is newer."""
    entry = Sign(datetime.fromisoformat(ledger.state.at), left=False)
    try:
        found = json.loads(state.read(DRIVER_JSON))
    except FileNotFoundError:
        return entry
    if found["id"] != ledger.state.driver["id"]:
        return entry
    return max(entry, Sign(datetime.fromisoformat(found["at"]), found["left"]), key=lambda sign: sign.at)


def _sign_until(ended: threading.Event, ledger: Ledger, state: Storage) -> None:
    while not ended.wait(ledger.driver.lease_s / SIGNS_PER_LEASE):
        _sign(ledger, state)


def _sign(ledger: Ledger, state: Storage, *, left: bool = False) -> None:
    """Write the sign if the run is this driver's; a failure is logged, for the ledger does without."""
    if ledger.state.driver.get("id") != ledger.driver.id:
        return
    said = {"id": ledger.driver.id, "at": datetime.now(UTC).isoformat(timespec="milliseconds"), "left": left}
    try:
        if ledger.state.phase is Phase.PUBLISHED:
            state.delete(DRIVER_JSON)
        else:
            state.put(DRIVER_JSON, json.dumps(said).encode())
    except Exception as error:  # any storage's: OSError, obstore's and fsspec's own
        log.warning("%s could not be written: %s", DRIVER_JSON, first_line(error))


def _describe_running(driver: Driver, state: Storage, reason: str) -> str:
    return (
        f"another driver ({driver}) is at work on {state.uri}: {reason}. Nothing was started; wait for its "
        "end, or replace it with --take-over"
    )


def _format_time(sign: Sign) -> str:
    return sign.at.isoformat(sep=" ", timespec="seconds")
