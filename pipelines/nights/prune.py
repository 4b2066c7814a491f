"""Removes the oldest dates of a table, file by file as their ledgers list them, and nothing else.

`_SUCCESS` goes first, so that no reader takes a half removed date for whole, and the ledger last, so that a
removal that was interrupted is finished by the next one. What no ledger lists stays and is named.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta

from pipelines.inventory.plan import PLAN_JSON, open_plan
from pipelines.ledger.entries import Phase
from pipelines.ledger.layout import SUCCESS
from pipelines.messages import InputError, redact
from pipelines.nights.folders import DateFolders, find_nights, latest_date, list_dates
from pipelines.nights.night import read_ledger
from pipelines.storage.storage import Storage
from pipelines.storage.uris import is_local, local_path

log = logging.getLogger(__name__)

OWN = re.compile(
    r"known/[\w.-]+|counts\.json|driver\.json|openlineage\.json|report\.(json|html)|hosts\.json"
    r"|validators\.parquet|verdict\.json"
    r"|categories\.parquet|pages/.+|gallery/.+"
)
"""What a night leaves in its state in addition to plan and ledger; each name has one meaning there."""
LAST = re.compile(r"run\.json|ledger/\d+\.json")


@dataclass(frozen=True)
class Removal:
    """What goes of one date."""

    folders: DateFolders
    table: tuple[str, ...]
    """Files of the table, `_SUCCESS` first."""
    state: tuple[str, ...]
    """Files below the date's state, ledgers last."""
    kept: tuple[str, ...]
    """Files that are there and in no list."""
    n_bytes: int


def find_removals(table_uri: str, *, keep_days: int) -> list[Removal]:
    """The published dates that are more than so many days older than the newest one, in order.

    A date that is not yet, of a mistyped year, does not count as the newest one.

    Raises:
        InputError: there is no table of nights.
    """
    nights, begun = find_nights(table_uri), list_dates(table_uri)
    if not begun:
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
        return []
    oldest = made[-1] - timedelta(days=keep_days)
    found = (_describe(table_uri, day) for day in begun if day < oldest)
    return [removal for removal in found if removal]


def _describe(table_uri: str, day: date) -> Removal | None:
    """What goes of a date; None if it was never published."""
    folders = DateFolders(table_uri, day)
    listed: set[str] = set()
    state: set[str] = set()
    begun = folders.runs()
    for first in begun:
        prefix, ledger = "" if first == 1 else f"g{first}/", read_ledger(folders.run(first))
        if first == begun[-1] and (ledger is None or ledger.state.phase is not Phase.PUBLISHED):
            log.warning("%s is kept: its last run is not finished", day)
            return None
        if ledger:
            listed |= set(ledger.state.files)
            state |= {prefix + part.path for part in ledger.state.parts}  # of a run that was replaced
        state |= _list_run(folders.run(first), prefix)
    there = {entry.path: entry.size for entry in folders.images.list()}
    below = {entry.path: entry.size for entry in folders.root.list()}
    table = [name for name in (SUCCESS, *sorted(listed)) if name in there]
    ordered = sorted(state & below.keys(), key=lambda path: (_is_last(path), path))
    kept = [*(there.keys() - set(table)), *(below.keys() - set(ordered))]
    n_bytes = sum(there[name] for name in table) + sum(below[path] for path in ordered)
    return Removal(folders, tuple(table), tuple(ordered), tuple(sorted(kept)), n_bytes)


def _list_run(state: Storage, prefix: str) -> set[str]:
    """The files of a run, as its plan lists them and as they are named."""
    planned = (
        {file.path for file in open_plan(state).files} | {PLAN_JSON} if state.exists(PLAN_JSON) else set()
    )
    named = {entry.path for entry in state.list() if OWN.fullmatch(entry.path) or LAST.fullmatch(entry.path)}
    return {prefix + path for path in planned | named}


def _is_last(path: str) -> bool:
    return LAST.fullmatch(re.sub(r"^g\d+/", "", path)) is not None


def remove(removals: Sequence[Removal]) -> None:
    """Remove what is listed."""
    for removal in removals:
        for storage, paths in (
            (removal.folders.images, removal.table),
            (removal.folders.root, removal.state),
        ):
            for path in paths:
                storage.delete(path)
            _remove_empty_folders(storage)


def _remove_empty_folders(storage: Storage) -> None:
    """Local folders that hold nothing any more; an object store has none."""
    if not is_local(storage.uri):
        return
    root = local_path(storage.uri)
    for folder in sorted([*root.rglob("*/"), root], key=lambda path: -len(path.parts)):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
