"""Which parts and files of a run count: an append-only log, each entry created if absent and chained.

    state/run.json             what the run is; a resume must agree with it
    state/ledger/000000.json …  start | parts | reopen | close | file | published

A file counts only if an entry lists it, and an item is listed once. Each number can be taken once, so one
create-if-absent log also fences two drivers: the one that finds its next number taken stops
(`LedgerLost`), and a driver that was paused can add nothing when it wakes.

After any exception, between any two lines, the same Ledger may be used again: a pending entry is kept, byte
for byte, until the storage is known to hold it.
"""

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from pipelines.ledger.driver import LEASE_S, Driver, identify_driver
from pipelines.ledger.entries import (
    Kind,
    LedgerState,
    Part,
    Phase,
    TableFile,
    apply,
    decode,
    encode,
    sum_counts,
)
from pipelines.ledger.item_set import ItemSet, Range, Ranges, concat, overlap
from pipelines.messages import JobFailed, OtherRun
from pipelines.storage.storage import Storage
from pipelines.storage.uris import AlreadyExists

RUN_JSON = "run.json"
READERS = 32
"""Entries read at once on a resume: a night of entries from an object store is then seconds."""


class LedgerLost(JobFailed):
    """Another driver has written the next entry: this one must stop."""


@dataclass(frozen=True)
class Pending:
    """An entry that is being written: kept until it is known to be stored."""

    entry: Mapping[str, Any]
    payload: bytes
    digest: str


def read_run_id(state: Storage) -> str:
    """What tells this run's rows from those of any other: a short hash of its `run.json`."""
    return hashlib.sha256(state.read(RUN_JSON)).hexdigest()[:16]


class Ledger:
    """Owns the log of one state folder, as one driver sees and extends it."""

    def __init__(
        self, storage: Storage, n_items: int, *, lease_s: float = LEASE_S, first_generation: int = 1
    ) -> None:
        self._storage = storage
        self._pending: Pending | None = None
        self.driver = identify_driver(lease_s)
        self.state = LedgerState(generation=first_generation)
        self.done = ItemSet(n_items)
        """Items that are recorded, in this generation or an earlier one."""
        self._paths: set[str] = set()
        for payload in _read_entries(storage):
            self._take(*decode(payload))

    @classmethod
    def open(
        cls,
        storage: Storage,
        identity: Mapping[str, Any],
        *,
        n_items: int,
        details: Mapping[str, Any] | None = None,
        lease_s: float = LEASE_S,
        first_generation: int = 1,
    ) -> "Ledger":
        """The ledger of a state folder, which is made if there is none yet.

        Args:
            identity: flat, JSON-able settings that decide what the rows will say.
            details: more about the run, stored with the identity but not compared.
            lease_s: a driver that was silent for so long may be replaced.
            first_generation: of a new ledger; above 1 where its table replaces another ledger's.

        Raises:
            OtherRun: the folder holds a run of another identity.
            LedgerDamaged: entries are missing or altered.
        """
        created_at = datetime.now(UTC).isoformat(timespec="microseconds")
        described = {"identity": dict(identity), "n_items": n_items, "created_at": created_at}
        described |= details or {}
        try:
            storage.create(RUN_JSON, json.dumps(described, indent=1, sort_keys=True).encode())
        except AlreadyExists:
            _refuse_other_run(json.loads(storage.read(RUN_JSON))["identity"], identity, storage.uri)
        return cls(storage, n_items, lease_s=lease_s, first_generation=first_generation)

    def announce(self, session: Mapping[str, Any] | None = None) -> None:
        """Take the run over, before anything costly starts.

        Args:
            session: what may differ from one driver to the next; JSON-able.

        Raises:
            LedgerLost: another driver did so since this one read the ledger.
        """
        generation = self.state.generation
        self._append("start", generation=generation, reopened=[], session=dict(session or {}))

    def start_generation(self, items: Sequence[Range], session: Mapping[str, Any] | None = None) -> None:
        """Start the next generation of a published run, in which these items are run again."""
        if self.state.phase is not Phase.PUBLISHED or not items:
            raise ValueError(
                f"only failed rows of a published run can be rerun; this run is {self.state.phase}"
            )
        self._append("start", reopened=items, session=dict(session or {}))

    def record(self, parts: Sequence[Part]) -> None:
        """Make the parts count, in one entry; a part that is recorded already is skipped.

        Raises:
            LedgerLost: another driver is at work; none of the parts counts.
            ValueError: a part repeats an item that is recorded.
        """
        self._write_pending()
        new = [part for part in parts if part.path not in self._paths]
        claimed = concat(part.items for part in new)
        if self.done.present(claimed) or overlap(claimed):
            raise ValueError(
                f"{new[0].path} and the parts after it repeat recorded items; remove those before recording"
            )
        if new:
            self._append("parts", parts=[asdict(part) for part in new])

    def reopen(self, parts: Mapping[str, Part | None]) -> None:
        """Put parts of fewer items, or none, in the place of recorded ones; the other items are run again.

        Args:
            parts: what replaces the part of each path.
        """
        kept = [asdict(part) for part in parts.values() if part]
        self._append("reopen", removed=list(parts), parts=kept)

    def close(self, rows_per_file: int) -> None:
        """Take no more parts; from here on the layout of the table is fixed.

        Raises:
            ValueError: items are missing.
        """
        if not self.done.full:
            raise ValueError(
                f"{self.done.n_items - len(self.done)} of {self.done.n_items} items are not recorded yet"
            )
        self._append("close", rows_per_file=rows_per_file)

    def record_file(self, file: TableFile, *, replaces: str | None = None) -> None:
        """Make a table file count, in place of an earlier one of its name or of the name given."""
        self._append("file", file=asdict(file), replaces=replaces)

    def publish(self) -> None:
        """Record that the table is complete."""
        self._append("published")

    def check(self) -> None:
        """Look for a rival's entry when there is nothing to record. Raises LedgerLost."""
        self._write_pending()
        if self._storage.exists(_entry_path(self.state.entries)):
            raise LedgerLost(self._describe_rival())

    @contextmanager
    def detect_rival(self) -> Iterator[None]:
        """Where a file is gone or changed because of a rival, raise LedgerLost instead."""
        try:
            yield
        except (FileNotFoundError, AlreadyExists):
            self.check()
            raise

    def statuses(self) -> Counter[str]:
        """Rows by status, in the parts of this generation."""
        return sum_counts(part.statuses for part in self.state.parts)

    def hosts(self) -> Counter[str]:
        """Rows without a label by host, in the parts of this generation."""
        return sum_counts(part.hosts for part in self.state.parts)

    def _append(self, kind: Kind, **fields: Any) -> None:
        self._write_pending()
        entry = {
            "format_version": 1,
            "number": self.state.entries,
            "previous": self.state.digest,
            "kind": kind,
            "driver": asdict(self.driver),
            "nonce": uuid.uuid4().hex,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            **fields,
        }
        apply(self.state, entry, "")  # raises now what a reader would call damage later
        self._pending = Pending(entry, *encode(entry))
        self._write_pending()

    def _write_pending(self) -> None:
        """Store the pending entry, if there is one; the storage accepts the same bytes twice."""
        if self._pending is None:
            return
        pending = self._pending
        if pending.entry["number"] == self.state.entries:
            try:
                self._storage.create(_entry_path(pending.entry["number"]), pending.payload)
            except AlreadyExists:
                raise LedgerLost(self._describe_rival()) from None
            self._take(pending.entry, pending.digest)
        self._pending = None

    def _take(self, entry: Mapping[str, Any], digest: str) -> None:
        """Bits first: setting them twice is harmless, and the state says whether the entry was taken."""
        state = apply(self.state, entry, digest)
        self.done.remove(Ranges(entry.get("reopened", ())))
        removed = set(entry.get("removed", ()))
        self.done.remove(concat(part.items for part in self.state.parts if part.path in removed))
        for part in entry.get("parts", ()):
            self.done.add(part["items"])
            self._paths.add(part["path"])
        self.state = state

    def _describe_rival(self) -> str:
        path = _entry_path(self.state.entries)
        rival, _ = decode(self._storage.read(path))
        return (
            f"another driver ({Driver(**rival['driver'])}) is at work on {self._storage.uri}: "
            f"it wrote {path} at {rival['at']}. This one stops; what it recorded until then stays recorded"
        )


def _read_entries(storage: Storage) -> list[bytes]:
    """Every entry's bytes in order; a gap is found when they are applied."""
    paths = [entry.path for entry in storage.list("ledger") if entry.path.endswith(".json")]
    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(storage.read, sorted(paths)))


def _refuse_other_run(found: Mapping[str, Any], asked: Mapping[str, Any], uri: str) -> None:
    """Raise InputError that names every setting in which two runs differ."""
    asked = json.loads(json.dumps(dict(asked)))
    differing = [
        f"{name} was {found.get(name)!r} and is now {asked.get(name)!r}"
        for name in sorted({*found, *asked})
        if found.get(name) != asked.get(name)
    ]
    if differing:
        raise OtherRun(
            f"{uri} holds a different run: {'; '.join(differing)}. "
            "The same inventory, bundle and settings continue that run"
        )


def _entry_path(number: int) -> str:
    """Path of an entry below the state folder."""
    return f"ledger/{number:06d}.json"
