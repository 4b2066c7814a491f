"""Removes the oldest dates of a table, file by file as their ledgers list them, and nothing else.

What goes is written down first, as `removing.json` in the date's state: from then on the date is not there
for nights and `verify`, and the next removal finishes one that was interrupted by that list. `_SUCCESS` goes
before the files that it lists, and `removing.json` last. What no ledger lists stays and is named.
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from pipelines.inventory.plan import PLAN_JSON, open_plan
from pipelines.ledger.entries import LedgerDamaged, Phase
from pipelines.ledger.layout import SUCCESS
from pipelines.messages import InputError, first_line, redact
from pipelines.nights.folders import (
    REMOVING,
    WRONG_CONTENT,
    DateFolders,
    find_nights,
    latest_date,
    list_dates,
    list_removing,
)
from pipelines.nights.night import read_ledger
from pipelines.storage.storage import Storage
from pipelines.storage.uris import is_local, local_path

log = logging.getLogger(__name__)

OWN = re.compile(
    r"known/[\w.-]+|counts\.json|driver\.json|openlineage\.json|report\.(json|html)|hosts\.json"
    r"|validators\.parquet|verdict\.json"
    r"|categories\.parquet|pages/.+|gallery/.+|run\.json|ledger/\d+\.json"
)
"""What a night leaves in its state in addition to the plan; each name has one meaning there."""


@dataclass(frozen=True)
class Removal:
    """What goes of one date."""

    folders: DateFolders
    table: tuple[str, ...]
    """Files of the table."""
    state: tuple[str, ...]
    """Files below the date's state."""
    kept: tuple[str, ...]
    """Files that are there and in no list."""
    n_bytes: int


def find_removals(table_uri: str, *, keep_days: int) -> list[Removal]:
    """The published dates that are more than so many days older than the newest one, in order.

    Those whose removal was interrupted come first. A date that is not yet, of a mistyped year, does not count
    as the newest one.

    Raises:
        InputError: there is no table of nights.
    """
    nights, begun = find_nights(table_uri), list_dates(table_uri)
    interrupted = [_resume(DateFolders(table_uri, day)) for day in list_removing(table_uri)]
    if not begun and not interrupted:
        raise InputError(f"{redact(table_uri)} holds no night; give the folder that was --table of `nightly`")
    latest = latest_date()
    for night in nights:
        if night.date > latest:
            log.warning(
                "%s is in the future and not counted from; if it is a mistake, remove %s and %s",
                night.date, redact(night.table.uri), redact(DateFolders(table_uri, night.date).root.uri),
            )  # fmt: skip
    made = [night.date for night in nights if night.date <= latest]
    if not made:
        return interrupted
    oldest = made[-1] - timedelta(days=keep_days)
    found = (_describe_readable(DateFolders(table_uri, day)) for day in begun if day < oldest)
    return interrupted + [removal for removal in found if removal]


def _describe_readable(folders: DateFolders) -> Removal | None:
    """What goes of a date; None, with a warning, if its plan or ledger cannot be read."""
    try:
        return _describe(folders)
    except (InputError, LedgerDamaged, *WRONG_CONTENT) as error:
        log.warning(
            "%s is kept: its state cannot be read (%s); restore it, or remove %s and %s",
            folders.date, first_line(error), redact(folders.images.uri), redact(folders.root.uri),
        )  # fmt: skip
        return None


def _resume(folders: DateFolders) -> Removal:
    """What is left of a removal that was interrupted."""
    listed = json.loads(folders.root.read(REMOVING))
    return _find_files(folders, set(listed["table"]), set(listed["state"]))


def _describe(folders: DateFolders) -> Removal | None:
    """What goes of a date; None if it was never published."""
    listed: set[str] = set()
    state: set[str] = set()
    begun = folders.runs()
    for first in begun:
        prefix, ledger = "" if first == 1 else f"g{first}/", read_ledger(folders.run(first))
        if first == begun[-1] and (ledger is None or ledger.state.phase is not Phase.PUBLISHED):
            log.warning("%s is kept: its last run is not finished", folders.date)
            return None
        if ledger:
            listed |= set(ledger.state.files)
            state |= {prefix + part.path for part in ledger.state.parts}  # of a run that was replaced
        state |= _list_run(folders.run(first), prefix)
    return _find_files(folders, {SUCCESS, *listed}, state)


def _find_files(folders: DateFolders, table: set[str], state: set[str]) -> Removal:
    """The listed files that are there, and those that are there and not listed."""
    there = {entry.path: entry.size for entry in folders.images.list()}
    below = {entry.path: entry.size for entry in folders.root.list() if entry.path != REMOVING}
    kept = sorted([*(there.keys() - table), *(below.keys() - state)])
    table, state = table & there.keys(), state & below.keys()
    n_bytes = sum(there[name] for name in table) + sum(below[path] for path in state)
    return Removal(folders, tuple(sorted(table)), tuple(sorted(state)), tuple(kept), n_bytes)


def _list_run(state: Storage, prefix: str) -> set[str]:
    """The files of a run, as its plan lists them and as they are named."""
    planned = (
        {file.path for file in open_plan(state).files} | {PLAN_JSON} if state.exists(PLAN_JSON) else set()
    )
    named = {entry.path for entry in state.list() if OWN.fullmatch(entry.path)}
    return {prefix + path for path in planned | named}


def remove(removals: Sequence[Removal]) -> None:
    """Remove what is listed, so that a removal which ends anywhere is finished by the next one."""
    for removal in removals:
        images, root = removal.folders.images, removal.folders.root
        listed = {"table": removal.table, "state": removal.state}
        root.put(REMOVING, json.dumps(listed, indent=1).encode())
        images.delete(SUCCESS)
        _delete(images, removal.table)
        _delete(root, removal.state)
        root.delete(REMOVING)
        _remove_empty_folders(root)


def _delete(storage: Storage, paths: Sequence[str]) -> None:
    if paths:
        storage.delete(*paths)
    _remove_empty_folders(storage)


def _remove_empty_folders(storage: Storage) -> None:
    """Local folders that hold nothing any more; an object store has none."""
    if not is_local(storage.uri):
        return
    root = local_path(storage.uri)
    for folder in sorted([*root.rglob("*/"), root], key=lambda path: -len(path.parts)):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
