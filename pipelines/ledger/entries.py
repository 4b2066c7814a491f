"""One entry of the ledger: its fields, its sealed bytes, and what the run looks like after it. Pure, no I/O.

An entry is one JSON object that ends in its own sha256 and repeats that of the entry before, so that none
can be lost, altered or exchanged unnoticed. `after` is the whole arithmetic of a run; `ledger.py` keeps it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

from pipelines.ledger.item_set import Range

Kind = Literal["start", "parts", "close", "file", "published"]


class LedgerDamaged(ValueError):
    """The entries are not what any driver wrote: one is missing, altered or out of order."""


class State(StrEnum):
    """How far the current generation is."""

    RUNNING = "running"
    """Parts may be recorded."""
    PUBLISHING = "publishing"
    """Closed to new parts; table files are being written."""
    PUBLISHED = "published"
    """The table is complete."""


@dataclass(frozen=True)
class Part:
    """One written Parquet file below the state folder, and what is in it."""

    path: str
    sha256: str
    bytes: int
    items: tuple[Range, ...]
    """Row ids of the plan, in file order."""
    rows: int
    """Table rows: an item answers for one row or more."""
    statuses: Mapping[str, int]
    """Table rows by status."""
    hosts: Mapping[str, int]
    """Table rows without a label by the host they come from, the most frequent ones."""


@dataclass(frozen=True)
class TableFile:
    """One published file below the table folder."""

    name: str
    sha256: str
    bytes: int
    items: tuple[Range, ...]
    rows: int
    statuses: Mapping[str, int]
    labels: Mapping[str, int]
    """Table rows by `top_id`."""
    generation: int


@dataclass(frozen=True)
class View:
    """What the entries so far say."""

    entries: int = 0
    digest: str = ""
    """Checksum of the last entry, which the next one repeats."""
    generation: int = 1
    """1 for the first run; each rerun of failed rows is another."""
    state: State = State.RUNNING
    parts: tuple[Part, ...] = ()
    """Recorded in this generation, in order."""
    files: Mapping[str, TableFile] = field(default_factory=dict)
    """Published files by name, each as last written."""
    rows_per_file: int = 0
    reopened: tuple[Range, ...] = ()
    """Items that this generation runs again; empty in the first, which runs all."""
    driver: Mapping[str, Any] = field(default_factory=dict)
    """Who started last."""
    sessions: tuple[Mapping[str, Any], ...] = ()
    """What each driver that started said of itself, in order."""


def sealed(entry: Mapping[str, Any]) -> tuple[bytes, str]:
    """An entry's stored bytes, one JSON object that ends in its own sha256, and that checksum."""
    body = json.dumps(entry, separators=(",", ":"))
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f'{body[:-1]},"sha256":"{digest}"}}'.encode(), digest


def unsealed(payload: bytes) -> tuple[dict[str, Any], str]:
    """The inverse of `sealed`. Raises LedgerDamaged if a byte was changed."""
    body, _, tail = payload.decode(errors="replace").rpartition(',"sha256":"')
    body, digest = body + "}", tail.removesuffix('"}')
    if hashlib.sha256(body.encode()).hexdigest() != digest:
        raise LedgerDamaged(f"a ledger entry was altered or cut short: {payload[:80]!r}…")
    return json.loads(body), digest


def after(view: View, entry: Mapping[str, Any], digest: str) -> View:
    """The view once `entry`, whose checksum is `digest`, is in the ledger.

    Raises:
        LedgerDamaged: no driver could have written this entry here.
    """
    number, kind = entry["number"], entry["kind"]
    if number != view.entries or entry["previous"] != view.digest:
        raise LedgerDamaged(
            f"ledger entry {number:06d} does not follow the one before it: one was lost or altered"
        )
    allowed: dict[str, Iterable[State]] = {"start": State, "parts": [State.RUNNING], "close": [State.RUNNING]}
    if view.state not in allowed.get(kind, [State.PUBLISHING]):
        raise LedgerDamaged(f"ledger entry {number:06d} says {kind!r}, but the run was already {view.state}")
    view = replace(view, entries=number + 1, digest=digest)
    match kind:
        case "start":
            return started(view, entry)
        case "parts":
            return replace(view, parts=(*view.parts, *(part_of(part) for part in entry["parts"])))
        case "close":
            return replace(view, state=State.PUBLISHING, rows_per_file=entry["rows_per_file"])
        case "file":
            file = file_of(entry["file"])
            return replace(view, files={**view.files, file.name: file})
        case _:
            return replace(view, state=State.PUBLISHED)


def started(view: View, entry: Mapping[str, Any]) -> View:
    """A driver announced itself; with `reopened` it also opened the next generation."""
    view = replace(view, driver=entry["driver"], sessions=(*view.sessions, entry["session"]))
    if not entry["reopened"]:
        return view
    return replace(
        view,
        generation=view.generation + 1,
        state=State.RUNNING,
        parts=(),
        reopened=ranges_from(entry["reopened"]),
    )


def part_of(written: Mapping[str, Any]) -> Part:
    """A part from its JSON form."""
    return Part(**{**written, "items": ranges_from(written["items"])})


def file_of(written: Mapping[str, Any]) -> TableFile:
    """A table file from its JSON form."""
    return TableFile(**{**written, "items": ranges_from(written["items"])})


def ranges_from(written: Iterable[Sequence[int]]) -> tuple[Range, ...]:
    """Ranges from JSON, which knows no tuples."""
    return tuple((start, stop) for start, stop in written)


def total(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    """The sum of counts by name."""
    summed: Counter[str] = Counter()
    for each in counts:
        summed.update(each)
    return summed
