"""One night: what is unchanged is carried over, the rest is classified, and the date is published whole.

    decide and carry  ->  classify what is left  ->  gather what the parts say  ->  publish, report, verdict

Each step leaves what the next one needs in the state folder, so that a night continues wherever it stopped.
Decisions are made again by each process that finds images missing: the ledger says what is carried already.
"""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import duckdb
import pyarrow as pa

from pipelines.classify import run as runs
from pipelines.classify.run import Run
from pipelines.ledger import publish
from pipelines.ledger.entries import Phase
from pipelines.ledger.layout import GENERATIONS
from pipelines.ledger.ledger import RUN_JSON, Ledger
from pipelines.ledger.parts import Committer, reopen_known
from pipelines.ledger.verify import REPORT_JSON
from pipelines.nights.carry import Target, carry_rows
from pipelines.nights.contents import (
    History,
    forget_contents,
    make_completer,
    name_reused,
    write_contents,
    write_earlier,
    write_reused,
)
from pipelines.nights.database import create_view, open_workspace
from pipelines.nights.decide import count_removed, decide
from pipelines.nights.folders import DateFolders, Night, find_nights, find_reusable
from pipelines.nights.validators import (
    HOSTS,
    VALIDATORS,
    Gathered,
    find_unreliable_hosts,
    gather,
    read_unreliable_hosts,
    store_validators,
)
from pipelines.status import CARRIED
from pipelines.storage.storage import Storage, open_storage

VERDICT_JSON = "verdict.json"
CARRY_JSON = "known/carry.json"
NIGHT_JSON = "known/night.json"

log = logging.getLogger(__name__)


@dataclass
class NightRun:
    """One night that is being made."""

    folders: DateFolders
    run: Run
    keep_failures: int
    """Nights for which a failure that does not pass by itself is carried."""


def read_verdict(folders: DateFolders) -> Mapping[str, Any] | None:
    """What became of a published date: `exit_code`, `line`, `generation`; None if it is not finished."""
    begun = folders.runs()
    state = folders.run(begun[-1] if begun else 1)
    ledger = read_ledger(state)
    if not ledger or ledger.state.phase is not Phase.PUBLISHED or not folders.root.exists(VERDICT_JSON):
        return None
    publish.finish(ledger, state, folders.images, GENERATIONS)
    verdict: Mapping[str, Any] = json.loads(folders.root.read(VERDICT_JSON))
    return verdict if verdict["generation"] == ledger.state.generation else None


def read_ledger(state: Storage) -> Ledger | None:
    """The ledger of a state folder, if a run was begun there."""
    if not state.exists(RUN_JSON):
        return None
    return Ledger(state, json.loads(state.read(RUN_JSON))["n_items"])


def carry_over(night: NightRun) -> None:
    """Carry what is unchanged, and leave for the workers what earlier nights know."""
    run = night.run
    if run.ledger.state.phase is not Phase.RUNNING:
        return
    if run.ledger.done.full and run.state.exists(CARRY_JSON):
        return
    started = time.monotonic()
    nights, previous, history = _look_back(night)
    with open_workspace() as (database, folder):
        if previous and run.plan.n_items:
            found = decide(
                database, run.plan, previous, tonight=night.folders.date, keep_failures=night.keep_failures
            )
            counts = {**found.count(), "removed": found.removed}
        else:
            counts = {"new": run.plan.n_items, "removed": count_removed(database, run.plan, nights)}
        run.seconds["decide"] = time.monotonic() - started
        if not run.state.exists(CARRY_JSON):
            if previous and not run.ledger.done.full:
                carry_rows(database, previous, _carry_target(night))
            about = {"previous": str(previous.date) if previous else None, "images": counts}
            run.state.put(CARRY_JSON, json.dumps(about, indent=1).encode())
        run.seconds["carry"] = time.monotonic() - started - run.seconds["decide"]
        if previous and not run.ledger.done.full:
            write_earlier(database, read_unreliable_hosts(previous.state), run.state, folder)
        if not run.ledger.done.full:
            write_contents(database, history, run.state, folder)
    log.info("%s of %s images are carried over", f"{len(run.ledger.done):,}", f"{run.plan.n_items:,}")
    run.seconds["plan"] = run.seconds.get("plan", 0.0) + time.monotonic() - started


def publish_night(night: NightRun) -> None:
    """Publish the date, of which everything is gathered, and leave its report.

    Raises:
        Refused: more rows have no label than the budget allows.
    """
    run = night.run
    run.layout = replace(GENERATIONS, complete=make_completer(run.state, run.ledger.state.generation))
    run.about["night"] = json.loads(run.state.read(NIGHT_JSON))
    runs.publish_table(run)


def ensure_report(night: NightRun) -> None:
    """Write `report.json` if the process that published the date died before it did."""
    run = night.run
    if not runs.is_reported(run):
        run.about["night"] = json.loads(run.state.read(NIGHT_JSON))
        runs.write_report(run)


def finish_night(night: NightRun, exit_code: int, drift: str) -> str:
    """Leave the verdict of a published and reported date; returns its line.

    Args:
        drift: what the line says of drift.
    """
    run, root = night.run, night.folders.root
    if run.state.uri != root.uri:
        root.put(REPORT_JSON, run.state.read(REPORT_JSON))
    line = f"{describe(night)}; {drift}"
    verdict = {"generation": run.ledger.state.generation, "exit_code": exit_code, "line": line}
    root.put(VERDICT_JSON, json.dumps(verdict, indent=1).encode())
    return line


def describe(night: NightRun) -> str:
    """The night in one line."""
    rows = json.loads(night.run.state.read(NIGHT_JSON))["rows"]
    parts = [
        f"{rows['carried']:,} carried", f"{rows['not_modified']:,} not modified (304)",
        f"{rows['same_bytes']:,} of known bytes", f"{rows['tonight']:,} from tonight",
    ]  # fmt: skip
    return f"{runs.summarize(night.run)}; {', '.join(parts)}"


def _look_back(night: NightRun) -> tuple[list[Night], Night | None, History]:
    """The nights until tonight, the last one of equal settings, and all those."""
    nights = find_nights(night.folders.table_uri, until=night.folders.date)
    identity = json.loads(night.run.state.read(RUN_JSON))["identity"]
    reusable = find_reusable(nights, identity)
    previous = next((one for one in reversed(reusable) if one.state.exists(VALIDATORS)), None)
    return nights, previous, History(reusable, night.folders.date)


def _carry_target(night: NightRun) -> Target:
    run = night.run
    context = runs.part_context(run, final=True)
    committer = Committer(run.ledger, run.state, every_s=run.settings.commit_interval_s)
    return Target(run.plan, run.state, context, committer, night.folders.date)


def gather_night(night: NightRun) -> bool:
    """From the recorded parts: the table of validators, the results that are reused, and counts.

    Returns:
        Whether that is all. Otherwise results that were found in an earlier night are gone, since it was
        pruned or replaced meanwhile: their images are left to classify, as new ones.
    """
    started, run = time.monotonic(), night.run
    if run.ledger.state.phase is not Phase.RUNNING:
        return True
    rerun = bool(run.ledger.state.reopened)
    _, previous, history = _look_back(night)
    with open_workspace() as (database, folder):
        found = gather(run.ledger.state.parts, run.state, folder, tonight=night.folders.date)
        create_view(database, "fetched", open_storage(str(folder)), [found.fetched.name])
        if any(found.counts[status] for status in CARRIED):
            path = name_reused(run.ledger.state.generation)
            lost = write_reused(database, history, run.state, path, found.reused)
            if len(lost):
                _reopen(run, lost)
                return False
        if not rerun:
            _leave_counts(database, found, previous, run.state)
        store_validators(found, run.state, rerun=rerun)
    run.seconds["gather"] = time.monotonic() - started
    return True


def _reopen(run: Run, lost: pa.ChunkedArray) -> None:
    """Leave the images of these contents to classify, and the workers without what led to them."""
    forget_contents(run.state)
    n_items = reopen_known(run.ledger, run.state, lost)
    log.warning(
        "the results of %s images are gone from the earlier nights that had them: these images are fetched "
        "and classified again", f"{n_items:,}",
    )  # fmt: skip


def _leave_counts(
    database: duckdb.DuckDBPyConnection, found: Gathered, previous: Night | None, state: Storage
) -> None:
    unreliable: list[dict[str, object]] = []
    if previous:
        create_view(database, "seen", previous.state, [VALIDATORS])
        unreliable = find_unreliable_hosts(database)
    for host in unreliable:
        log.warning(
            "%s changes its validators though its images are the same (%s of %s); they are ignored",
            host["host"], host["unreliable"], host["images"],
        )  # fmt: skip
    repeats = "SELECT count(*) - count(DISTINCT sha256) FROM fetched WHERE status = 'ok'"
    (copies,) = database.sql(repeats).fetchall()[0]
    about = {
        **json.loads(state.read(CARRY_JSON)),
        "rows": found.counts,
        "classified_copies": copies,
        "unreliable_hosts": unreliable,
    }
    state.put(HOSTS, json.dumps(unreliable, indent=1).encode())
    state.put(NIGHT_JSON, json.dumps(about, indent=1).encode())
