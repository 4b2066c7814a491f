"""Where the nights of a table are, and which are published.

    TABLE/images/run_date=D/      the files of a night, `_SUCCESS` last
    TABLE/state/run_date=D/       the run that made it; its reports, verdict.json
    TABLE/state/run_date=D/g2/    the run that replaced it from generation 2 on, if one did
    TABLE/state/run_date=D/removing.json    the date is being removed, and is not there for any reader

Readers look at `images/` only. What is said here of a night comes from its `_SUCCESS` and its `run.json`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from pipelines.ledger.layout import SUCCESS, decode_manifest
from pipelines.ledger.ledger import RUN_JSON
from pipelines.storage.storage import Storage, open_storage
from pipelines.storage.uris import join

IMAGES, STATE = "images", "state"
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
    """The published nights by date, up to and including one."""
    images = open_storage(join(table_uri, IMAGES))
    found = (_MARKER.fullmatch(entry.path) for entry in images.list())
    dates = sorted(date.fromisoformat(marker[1]) for marker in found if marker)
    nights = (DateFolders(table_uri, day) for day in dates if until is None or day <= until)
    return [_read_night(folders) for folders in nights if not folders.is_removing()]


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
    found = [_DATE.match(entry.path) for entry in open_storage(join(table_uri, STATE)).list()]
    paths = [(date.fromisoformat(path[1]), path[2]) for path in found if path]
    return {day for day, _ in paths}, {day for day, name in paths if name == REMOVING}


def _read_night(folders: DateFolders) -> Night:
    manifest = decode_manifest(folders.images.read(SUCCESS))
    first = max(run for run in folders.runs() if run <= manifest["generation"])
    state = folders.run(first)
    return Night(
        date=folders.date,
        table=folders.images,
        state=state,
        generation=manifest["generation"],
        files=tuple(file["name"] for file in manifest["files"]),
        n_rows=sum(file["rows"] for file in manifest["files"]),
        identity=json.loads(state.read(RUN_JSON))["identity"],
    )


def find_reusable(nights: Sequence[Night], identity: Mapping[str, Any]) -> list[Night]:
    """The nights whose results are those that a run of this identity would have."""
    wanted = tuple(identity.get(name) for name in RESULT_KEY)
    return [night for night in nights if night.result_key == wanted]
