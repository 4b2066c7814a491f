"""Where the nights of a table are, and which are published.

    TABLE/images/run_date=D/      the files of a night, `_SUCCESS` last
    TABLE/state/run_date=D/       the run that made it; its reports, verdict.json
    TABLE/state/run_date=D/g2/    the run that replaced it from generation 2 on, if one did
    TABLE/state/run_date=D/removing.json    the date is being removed, and is not there for any reader

Readers look at `images/` only. What is said here of a night comes from its `_SUCCESS` and its `run.json`.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cache
from typing import Any

from pipelines.ledger.layout import SUCCESS, decode_manifest
from pipelines.ledger.ledger import RUN_JSON
from pipelines.messages import InputError, first_line, redact
from pipelines.storage.storage import Storage, open_storage
from pipelines.storage.uris import join

log = logging.getLogger(__name__)

IMAGES, STATE = "images", "state"
WRONG_CONTENT = (ValueError, KeyError, TypeError, FileNotFoundError)
"""What reading a file raises that is gone, empty, or of another program."""
REMOVING = "removing.json"
RESULT_KEY = ("model_id", "precision", "top_k", "max_pixels", "max_side")
"""What decides a result besides the image's bytes: only results of equal settings are carried over."""
_MARKER = re.compile(rf"run_date=(\d{{4}}-\d\d-\d\d)/{SUCCESS}")
_DATE = re.compile(r"run_date=(\d{4}-\d\d-\d\d)/(.+)")
_RUN = re.compile(r"g(\d+)/.*")


@dataclass(frozen=True)
class Night:
    """One published date."""

    date: date
    table: Storage
    state: Storage
    """Of the run that published it."""
    generation: int
    files: tuple[str, ...]
    n_rows: int
    identity: Mapping[str, Any]
    """As the run's ledger has it."""

    @property
    def result_key(self) -> tuple[object, ...]:
        """The values of `RESULT_KEY`."""
        return tuple(self.identity.get(name) for name in RESULT_KEY)


@dataclass(frozen=True)
class DateFolders:
    """The folders of one date of a table."""

    table_uri: str
    date: date

    @property
    def images(self) -> Storage:
        """The published files."""
        return open_storage(join(self.table_uri, IMAGES, f"run_date={self.date}"))

    @property
    def root(self) -> Storage:
        """The state of the date: its first run, and the reports of its last."""
        return open_storage(join(self.table_uri, STATE, f"run_date={self.date}"))

    def run(self, first_generation: int) -> Storage:
        """The state of the run that begins with this generation."""
        root = self.root
        return root if first_generation == 1 else open_storage(join(root.uri, f"g{first_generation}"))

    def is_removing(self) -> bool:
        """Whether a removal of the date was begun and is not finished."""
        return self.root.exists(REMOVING)

    def runs(self) -> list[int]:
        """The first generations of the runs that were begun, in order."""
        paths = [entry.path for entry in self.root.list()]
        replacing = {int(found[1]) for path in paths if (found := _RUN.fullmatch(path))}
        first = {1} if any(path.startswith(("plan/", "ledger/")) for path in paths) else set()
        return sorted(first | replacing)


def latest_date() -> date:
    """The latest date that a night may have: tomorrow by UTC, which is today in the far east."""
    return datetime.now(UTC).date() + timedelta(days=1)


def find_nights(table_uri: str, *, until: date | None = None) -> list[Night]:
    """The published nights by date; a folder that is no night is left out with a warning.

    Args:
        until: tonight, the last date to look for.

    Raises:
        InputError: tonight's own folder is there and is no night.
    """
    nights = []
    for day in list_published(table_uri):
        if until is None or day <= until:
            try:
                nights.append(_read_night(DateFolders(table_uri, day)))
            except InputError as error:
                if day == until:
                    raise
                _warn_once(f"{error}. It is left out")
    return nights


def list_published(table_uri: str) -> list[date]:
    """The dates that have a `_SUCCESS` and are not being removed, in order."""
    images = open_storage(join(table_uri, IMAGES))
    found = (_MARKER.fullmatch(entry.path) for entry in images.list())
    dates = _read_dates(images, {marker[1] for marker in found if marker})
    return sorted(day for day in dates.values() if not DateFolders(table_uri, day).is_removing())


def list_dates(table_uri: str) -> list[date]:
    """The dates that were begun or published and are not being removed, in order."""
    there, removing = _list_state(table_uri)
    return sorted(there - removing)


def list_removing(table_uri: str) -> list[date]:
    """The dates whose removal was begun and is not finished, in order."""
    _, removing = _list_state(table_uri)
    return sorted(removing)


def _list_state(table_uri: str) -> tuple[set[date], set[date]]:
    """The dates that have a state, and those of them that are being removed."""
    state = open_storage(join(table_uri, STATE))
    found = [path for entry in state.list() if (path := _DATE.match(entry.path))]
    dates = _read_dates(state, {path[1] for path in found})
    removing = {dates[path[1]] for path in found if path[1] in dates and path[2] == REMOVING}
    return set(dates.values()), removing


def _read_dates(folder: Storage, texts: Iterable[str]) -> dict[str, date]:
    """The dates that folders are named for; one such as 2026-13-45 is left out with a warning."""
    dates = {}
    for text in texts:
        try:
            dates[text] = date.fromisoformat(text)
        except ValueError as error:
            _warn_once(
                f"{redact(folder.uri)}/run_date={text} is no date ({error}): remove it. It is left out"
            )
    return dates


@cache
def _warn_once(message: str) -> None:
    """A command looks for the nights several times."""
    log.warning("%s", message)


def _read_night(folders: DateFolders) -> Night:
    """The night as its files say. Raises InputError: another program wrote them, or one is lost."""
    images, root = folders.images, folders.root
    remedy = f"restore what is missing, or remove {redact(images.uri)} and {redact(root.uri)}"
    try:
        manifest = decode_manifest(images.read(SUCCESS))
        generation = int(manifest["generation"])
        files = tuple(str(file["name"]) for file in manifest["files"])
        n_rows = sum(int(file["rows"]) for file in manifest["files"])
    except WRONG_CONTENT as error:
        reason = f"its {SUCCESS} does not list files as `nightly` does ({first_line(error)})"
        raise InputError(f"{redact(images.uri)} is no night: {reason}; {remedy}") from error
    try:
        state = folders.run(max(run for run in folders.runs() if run <= generation))
        identity = json.loads(state.read(RUN_JSON))["identity"]
    except WRONG_CONTENT as error:
        reason = f"{redact(root.uri)} does not hold the {RUN_JSON} of generation {generation}"
        raise InputError(f"{redact(images.uri)} is no night: {reason}; {remedy}") from error
    return Night(folders.date, images, state, generation, files, n_rows, identity)


def find_reusable(nights: Sequence[Night], identity: Mapping[str, Any]) -> list[Night]:
    """The nights whose results are those that a run of this identity would have."""
    wanted = tuple(identity.get(name) for name in RESULT_KEY)
    return [night for night in nights if night.result_key == wanted]
