"""One ledger entry: its fields, its encoded bytes, and the run's state after it. Pure, no I/O.

An entry is one JSON object that ends in its own sha256 and repeats the sha256 of the entry before, so a
lost, altered or exchanged entry is noticed. `apply` is the whole arithmetic of a run.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

from pipelines.ledger.item_set import Range, Ranges
from pipelines.messages import JobFailed

Kind = Literal["start", "parts", "reopen", "close", "file", "published"]


class LedgerDamaged(JobFailed):
    """The entries are not what any driver wrote: one is missing, altered or out of order."""


class Phase(StrEnum):
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
    items: Sequence[Range]
    """Item ids of the plan, in file order."""
    rows: int
    """Table rows: an item answers for one row or more."""
    statuses: Mapping[str, int]
    """Table rows by status."""
    hosts: Mapping[str, int]
    """Table rows without a label by host, the most frequent hosts."""


@dataclass(frozen=True)
class TableFile:
    """One published file below the table folder."""

    name: str
    sha256: str
    bytes: int
    items: Sequence[Range]
    rows: int
    statuses: Mapping[str, int]
    labels: Mapping[str, int]
    """Table rows by `top_id`."""
    generation: int


@dataclass(frozen=True)
class LedgerState:
    """What the entries so far say."""

    entries: int = 0
    digest: str = ""
    """Checksum of the last entry, which the next one repeats."""
    at: str = ""
    """When the last entry was written, ISO 8601."""
    generation: int = 1
    """Each rerun of failed rows is another; 1 first, or what the first driver announced."""
    phase: Phase = Phase.RUNNING
    parts: tuple[Part, ...] = ()
    """Recorded in this generation, in order."""
    files: Mapping[str, TableFile] = field(default_factory=dict)
    """Published files by name, each as last written."""
    rows_per_file: int = 0
    reopened: Sequence[Range] = ()
    """Items that this generation runs again; empty in the first, which runs all."""
    driver: Mapping[str, Any] = field(default_factory=dict)
    """Who started last: the fields of a `Driver`."""
    sessions: tuple[Mapping[str, Any], ...] = ()
    """What each driver that started said of itself, in order."""


def encode(entry: Mapping[str, Any]) -> tuple[bytes, str]:
    """An entry's stored bytes, one JSON object that ends in its own sha256, and that checksum."""
    body = json.dumps(entry, separators=(",", ":"), default=list)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f'{body[:-1]},"sha256":"{digest}"}}'.encode(), digest


def decode(payload: bytes) -> tuple[dict[str, Any], str]:
    """The inverse of `encode`. Raises LedgerDamaged if a byte was changed."""
    body, _, tail = payload.decode(errors="replace").rpartition(',"sha256":"')
    body, digest = body + "}", tail.removesuffix('"}')
    if hashlib.sha256(body.encode()).hexdigest() != digest:
        raise LedgerDamaged(f"a ledger entry was altered or cut short: {payload[:80]!r}…")
    return json.loads(body), digest


def apply(state: LedgerState, entry: Mapping[str, Any], digest: str) -> LedgerState:
    """The state once `entry`, whose checksum is `digest`, is in the ledger.

    Raises:
        LedgerDamaged: no driver could have written this entry here.
    """
    number, kind = entry["number"], entry["kind"]
    if number != state.entries or entry["previous"] != state.digest:
        raise LedgerDamaged(
            f"ledger entry {number:06d} does not follow the one before it: one was lost or altered"
        )
    allowed: dict[str, Iterable[Phase]] = {key: [Phase.RUNNING] for key in ("parts", "reopen", "close")}
    allowed["start"] = Phase
    if state.phase not in allowed.get(kind, [Phase.PUBLISHING]):
        raise LedgerDamaged(f"ledger entry {number:06d} says {kind!r}, but the run was already {state.phase}")
    state = replace(state, entries=number + 1, digest=digest, at=entry["at"])
    match kind:
        case "start":
            return _apply_start(state, entry)
        case "parts":
            return replace(state, parts=(*state.parts, *map(read_part_entry, entry["parts"])))
        case "reopen":
            kept = [part for part in state.parts if part.path not in entry["removed"]]
            return replace(state, parts=(*kept, *map(read_part_entry, entry["parts"])))
        case "close":
            return replace(state, phase=Phase.PUBLISHING, rows_per_file=entry["rows_per_file"])
        case "file":
            file = TableFile(**{**entry["file"], "items": Ranges(entry["file"]["items"])})
            others = {name: other for name, other in state.files.items() if name != entry.get("replaces")}
            return replace(state, files={**others, file.name: file})
        case _:
            return replace(state, phase=Phase.PUBLISHED)


def _apply_start(state: LedgerState, entry: Mapping[str, Any]) -> LedgerState:
    """A driver announced itself; with `reopened` it also started the next generation."""
    state = replace(state, driver=entry["driver"], sessions=(*state.sessions, entry["session"]))
    if not entry["reopened"]:
        return replace(state, generation=entry.get("generation", state.generation))
    return replace(
        state,
        generation=state.generation + 1,
        phase=Phase.RUNNING,
        parts=(),
        reopened=Ranges(entry["reopened"]),
    )


def read_part_entry(written: Mapping[str, Any]) -> Part:
    """A part from its JSON form."""
    return Part(**{**written, "items": Ranges(written["items"])})


def sum_counts(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    """The sum of counts by name."""
    summed: Counter[str] = Counter()
    for each in counts:
        summed.update(each)
    return summed
