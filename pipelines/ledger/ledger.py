"""What of a run counts: an append-only log of entries, each created if absent and chained to the one before.

    state/run.json             what the run is; a resume must agree with it
    state/ledger/000000.json …  start | parts | close | file | published

A file counts only if an entry lists it, and a row id is listed once. The next number can be taken once,
so a driver that finds it taken knows that another is at work and stops (`LedgerLost`): whoever started last
goes on, and a driver that was paused cannot add anything when it wakes. The arithmetic is `entries.py`'s,
whose names others import from here; what is inside the files, `output.py`'s and `publishing.py`'s.

After any exception, between any two lines, the same Ledger may be used again: an entry in hand is kept,
byte for byte, until the storage is known to hold it.
"""

import json
import os
import socket
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from pipelines.ledger.entries import (
    Kind,
    LedgerDamaged,
    Part,
    State,
    TableFile,
    View,
    after,
    part_of,
    ranges_from,
    sealed,
    total,
    unsealed,
)
from pipelines.ledger.item_set import ItemSet, Range, repeated
from pipelines.storage.storage import Storage
from pipelines.storage.uris import AlreadyExists

__all__ = [
    "RUN_JSON", "Ledger", "LedgerDamaged", "LedgerLost", "Part", "RunMismatch", "State", "TableFile", "View",
    "part_of", "ranges_from", "total",
]  # fmt: skip

RUN_JSON = "run.json"
READERS = 32
"""Entries read at once on a resume: a night of entries from an object store is then seconds."""


class RunMismatch(ValueError):
    """The folder holds the run of something else; the message names what differs."""


class LedgerLost(RuntimeError):
    """Another driver has written the next entry: this one must stop."""


@dataclass(frozen=True)
class InHand:
    """An entry that is being written: kept until it is known to be stored."""

    entry: Mapping[str, Any]
    payload: bytes
    digest: str


class Ledger:
    """Owns the log of one state folder, as one driver sees and extends it."""

    def __init__(self, state: Storage, n_items: int) -> None:
        self._state = state
        self._in_hand: InHand | None = None
        self._driver = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
        self.view = View()
        self.done = ItemSet(n_items)
        """Items that are recorded, in this generation or an earlier one."""
        self._paths: set[str] = set()
        for payload in read_entries(state):
            self._take(*unsealed(payload))

    @classmethod
    def open(
        cls,
        state: Storage,
        identity: Mapping[str, Any],
        *,
        n_items: int,
        details: Mapping[str, Any] | None = None,
    ) -> "Ledger":
        """The ledger of a state folder, which is made if there is none yet.

        Args:
            identity: flat, JSON-able settings that decide what the rows will say.
            details: more about the run, kept beside the identity but not compared.

        Raises:
            RunMismatch: the folder holds a run of another identity.
            LedgerDamaged: entries are missing or altered.
        """
        described = {"identity": dict(identity), "n_items": n_items, **(details or {})}
        try:
            state.create(RUN_JSON, json.dumps(described, indent=1, sort_keys=True).encode())
        except AlreadyExists:
            refuse_other(json.loads(state.read(RUN_JSON))["identity"], identity, state.uri)
        return cls(state, n_items)

    def announce(self, session: Mapping[str, Any] | None = None) -> None:
        """Take the run over, before anything costly starts.

        Args:
            session: what the driver says of itself that may differ from one to the next; JSON-able.

        Raises:
            LedgerLost: another driver did so since this one read the ledger.
        """
        self._append("start", reopened=[], session=dict(session or {}))

    def reopen(self, items: Sequence[Range], session: Mapping[str, Any] | None = None) -> None:
        """Open the next generation of a published run, in which these items are run again."""
        if self.view.state is not State.PUBLISHED or not items:
            raise ValueError(
                f"only failed rows of a published run can be rerun; this run is {self.view.state}"
            )
        self._append("start", reopened=items, session=dict(session or {}))

    def record(self, parts: Sequence[Part]) -> None:
        """Make the parts count, in one entry; a part that counts already is passed over.

        Raises:
            LedgerLost: another driver is at work; none of the parts counts.
            ValueError: a part repeats an item that is recorded.
        """
        self._settle()
        new = [part for part in parts if part.path not in self._paths]
        claimed = [span for part in new for span in part.items]
        if self.done.present(claimed) or repeated(claimed):
            raise ValueError(
                f"{new[0].path} and its neighbours repeat recorded items; repair them before recording"
            )
        if new:
            self._append("parts", parts=[asdict(part) for part in new])

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

    def record_file(self, file: TableFile) -> None:
        """Make a table file count, in place of an earlier one of its name."""
        self._append("file", file=asdict(file))

    def publish(self) -> None:
        """Say that the table is complete."""
        self._append("published")

    def check(self) -> None:
        """Find a rival early, when there is nothing to record. Raises LedgerLost."""
        self._settle()
        if self._state.exists(entry_path(self.view.entries)):
            raise LedgerLost(self._rival())

    @contextmanager
    def explaining_loss(self) -> Iterator[None]:
        """Where a file is gone or not as it was because of a rival, say that instead. Raises LedgerLost."""
        try:
            yield
        except (FileNotFoundError, AlreadyExists):
            self.check()
            raise

    def statuses(self) -> Counter[str]:
        """Rows by status, in the parts of this generation."""
        return total(part.statuses for part in self.view.parts)

    def hosts(self) -> Counter[str]:
        """Rows without a label by host, in the parts of this generation."""
        return total(part.hosts for part in self.view.parts)

    def _append(self, kind: Kind, **fields: Any) -> None:
        self._settle()
        entry = {
            "format_version": 1,
            "number": self.view.entries,
            "previous": self.view.digest,
            "kind": kind,
            "driver": self._driver,
            "nonce": uuid.uuid4().hex,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            **fields,
        }
        after(self.view, entry, "")  # what would be damage later is a mistake now
        self._in_hand = InHand(entry, *sealed(entry))
        self._settle()

    def _settle(self) -> None:
        """Bring an entry in hand to an end; the storage takes these very bytes twice without complaint."""
        if self._in_hand is None:
            return
        hand = self._in_hand
        if hand.entry["number"] == self.view.entries:
            try:
                self._state.create(entry_path(hand.entry["number"]), hand.payload)
            except AlreadyExists:
                raise LedgerLost(self._rival()) from None
            self._take(hand.entry, hand.digest)
        self._in_hand = None

    def _take(self, entry: Mapping[str, Any], digest: str) -> None:
        """Bits first: setting them twice is harmless, and the view decides whether the entry was taken."""
        view = after(self.view, entry, digest)
        self.done.remove(ranges_from(entry.get("reopened", ())))
        for part in entry.get("parts", ()):
            self.done.add(ranges_from(part["items"]))
            self._paths.add(part["path"])
        self.view = view

    def _rival(self) -> str:
        path = entry_path(self.view.entries)
        rival, _ = unsealed(self._state.read(path))
        who = f"{rival['driver']['host']}, pid {rival['driver']['pid']}"
        return (
            f"another driver ({who}) is at work on {self._state.uri}: it wrote {path} at {rival['at']}. "
            "This one stops; what it recorded until then stays recorded"
        )


def read_entries(state: Storage) -> list[bytes]:
    """Every entry's bytes in order; a gap shows when they are applied."""
    paths = [entry.path for entry in state.list("ledger") if entry.path.endswith(".json")]
    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(state.read, sorted(paths)))


def refuse_other(found: Mapping[str, Any], asked: Mapping[str, Any], uri: str) -> None:
    """Raise RunMismatch that names every setting in which two runs differ."""
    asked = json.loads(json.dumps(dict(asked)))
    differing = [
        f"{name} was {found.get(name)!r} and is now {asked.get(name)!r}"
        for name in sorted({*found, *asked})
        if found.get(name) != asked.get(name)
    ]
    if differing:
        raise RunMismatch(
            f"{uri} holds a different run: {'; '.join(differing)}. Use another output folder, "
            "or the same inventory, bundle and settings to continue that run"
        )


def entry_path(number: int) -> str:
    """Where an entry lies below the state folder."""
    return f"ledger/{number:06d}.json"
