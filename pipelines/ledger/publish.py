"""Recorded parts -> the published table, its `_SUCCESS`, and a cleared-up state folder; safe to repeat.

    1  the ledger is closed to new parts, which fixes the layout
    2  file by file: written under its final name in one atomic put, then entered in the ledger
    3  `published` is entered; `_SUCCESS` is written last; the parts are removed

The same ledger gives the same bytes, so whatever a crash left half done is done again over itself. A rerun
of failed rows replaces only the files that hold such rows, each at once and under its old name: a reader
sees every row exactly once at any moment.

A driver may be paused between any two steps, wake long after another has gone on, and must not write an old
file over a newer one. Object stores put a file only in place of what lay there before the ledger was checked.
Locally a file is renamed out of its generation's spool folder, which is removed at 3. A file system with
neither (`fenced` is False), and a file beyond `SINGLE_PUT_BYTES`, leave the moment between check and write.
"""

import hashlib
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import schema
from pipelines.inventory.plan import Plan
from pipelines.ledger.entries import LedgerState, Part, Phase, TableFile
from pipelines.ledger.item_set import ItemSet, Range, ids_of, join_adjacent, ranges_of
from pipelines.ledger.ledger import Ledger
from pipelines.ledger.parts import count_values, parts_folder, read_part
from pipelines.ledger.republish import list_row_items, replace_rows
from pipelines.messages import InputError, JobFailed
from pipelines.schema import ITEM_ID
from pipelines.status import TRANSIENT
from pipelines.storage.storage import Storage, sha256_of
from pipelines.storage.uris import Version, is_local, local_path

SUCCESS = "_SUCCESS"
ROWS_PER_GROUP = 65_536
"""Rows of a Parquet row group: large enough for column scans, small enough to hold one in memory."""


@dataclass(frozen=True)
class FileContent:
    """A table file before it is written."""

    name: str
    items: tuple[Range, ...]
    tables: Iterable[pa.Table]
    replaces: TableFile | None = None


def publish(ledger: Ledger, plan: Plan, state: Storage, table: Storage, *, rows_per_file: int) -> None:
    """Bring the table to completion, from wherever an earlier attempt stopped.

    Raises:
        ValueError: items are not recorded yet.
        InputError: readers would see files that are not this run's.
        LedgerLost: another driver has taken over.
        JobFailed: bytes have changed since they were recorded.
    """
    if ledger.state.phase is Phase.RUNNING:
        ledger.close(rows_per_file)
    if ledger.state.phase is Phase.PUBLISHING:
        refuse_foreign_files(ledger, table)
        with ledger.detect_rival():
            for content in files_to_write(ledger, plan, state, table):
                seen = table.version(content.name)
                ledger.check()  # after looking: what lies there is then none of a successor's
                ledger.record_file(_write_file(content, seen, ledger.state.generation, plan, state, table))
        ledger.publish()
    finish(ledger, state, table)


def finish(ledger: Ledger, state: Storage, table: Storage) -> None:
    """What remains once the ledger says `published`: the marker, and removing what is no longer needed."""
    if not table.exists(SUCCESS):
        table.put(SUCCESS, b"")
    for generation in range(1, ledger.state.generation + 1):
        for folder in (parts_folder(generation), spool_folder(generation)):
            state.delete(*[entry.path for entry in state.list(folder)])


def find_failed_items(ledger: Ledger, plan: Plan, table: Storage) -> list[Range]:
    """The items of a published table whose rows failed for passing reasons."""
    failed = ItemSet(plan.n_items)
    for file in ledger.state.files.values():
        if any(status.value in file.statuses for status in TRANSIENT):
            statuses = pq.read_table(table.open_input(file.name), columns=["status"])["status"]
            passing = pc.is_in(statuses, pa.array([status.value for status in TRANSIENT])).to_numpy()
            failed.add(ranges_of(np.unique(list_row_items(file.items, plan)[passing])))
    return failed.present([(0, plan.n_items)])


def refuse_foreign_files(ledger: Ledger, table: Storage) -> None:
    """Raise InputError if readers of the table would see files that this run has not written."""
    ours = set(ledger.state.files)
    if ledger.state.phase is Phase.PUBLISHING:
        ours |= {file_name(number) for number in range(len(assign_parts(ledger.state)))}
    foreign = [entry.path for entry in table.list() if entry.path not in ours and is_visible(entry.path)]
    if foreign:
        raise InputError(
            f"{table.uri} holds files that are not of this run and that readers would count too "
            f"({len(foreign)}, as {foreign[0]}); move them away or choose another output folder"
        )


def is_visible(path: str) -> bool:
    """Whether a reader of the folder would take the file for data."""
    return not path.rpartition("/")[2].startswith((".", "_"))


def files_to_write(ledger: Ledger, plan: Plan, state: Storage, table: Storage) -> Iterator[FileContent]:
    """The table files that this generation has yet to write, in order."""
    if ledger.state.generation > 1:
        for file in _stale_files(ledger.state):
            rows = replace_rows(file, ledger, plan, state, table)
            yield FileContent(file.name, file.items, rows, replaces=file)
        return
    for number, parts in enumerate(assign_parts(ledger.state)):
        if file_name(number) not in ledger.state.files:
            items = tuple(join_adjacent(span for part in parts for span in part.items))
            rows = (read_part(part, state).drop_columns([ITEM_ID]) for part in parts)
            yield FileContent(file_name(number), items, rows)


def _stale_files(state: LedgerState) -> list[TableFile]:
    """Files that hold rerun items and are not rewritten yet."""
    reopened = ids_of(state.reopened)
    older = [file for file in state.files.values() if file.generation < state.generation]
    return [file for file in older if np.isin(ids_of(file.items), reopened).any()]


def assign_parts(state: LedgerState) -> list[list[Part]]:
    """Which parts make up which file: whole parts in ledger order, until one fills the file."""
    files: list[list[Part]] = [[]]
    rows = 0
    for part in state.parts:
        if rows >= state.rows_per_file:
            files.append([])
            rows = 0
        files[-1].append(part)
        rows += part.rows
    return files


def file_name(number: int) -> str:
    """The deterministic name of a table file."""
    return f"part-{number:05d}.parquet"


def _write_file(
    content: FileContent, seen: Version | None, generation: int, plan: Plan, state: Storage, table: Storage
) -> TableFile:
    """Write one table file under its final name in one atomic put, in place of what was `seen` there.

    Raises:
        JobFailed: the file that it replaces is not the one that the ledger lists.
        AlreadyExists: another driver has written the file since it was seen.
    """
    statuses: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    with _open_spool(state, generation) as spool:
        fields = schema.predictions_schema(plan.carried)
        with pq.ParquetWriter(spool, fields, compression="zstd") as writer:
            for group in row_groups(content.tables, fields):
                writer.write_table(group, row_group_size=ROWS_PER_GROUP)
                statuses.update(count_values(group["status"]))
                labels.update(count_values(group["top_id"]))
        with spool.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        _refuse_damaged(content.replaces, sha256, table)
        size = spool.stat().st_size
        table.put_file_over(content.name, spool, seen)
    return TableFile(
        content.name, sha256, size, content.items, statuses.total(), dict(statuses), dict(labels), generation
    )


def row_groups(tables: Iterable[pa.Table], fields: pa.Schema) -> Iterator[pa.Table]:
    """The same rows cut anew, so that the bytes do not depend on how they were cut before."""
    waiting = fields.empty_table()
    for table in tables:
        waiting = pa.concat_tables([waiting, table.select(fields.names).cast(fields)])
        while waiting.num_rows >= ROWS_PER_GROUP:
            yield waiting.slice(0, ROWS_PER_GROUP).combine_chunks()
            waiting = waiting.slice(ROWS_PER_GROUP)
    if waiting.num_rows:
        yield waiting.combine_chunks()


def _refuse_damaged(replaces: TableFile | None, written: str, table: Storage) -> None:
    """A rewritten file must have been made from the listed one, or be there already from before a crash."""
    if replaces is None:
        return
    found = sha256_of(table, replaces.name)
    if found not in (replaces.sha256, written):
        raise JobFailed(
            f"{table.uri}/{replaces.name} has sha256 {found}, the ledger lists {replaces.sha256}: "
            "it was altered after it was published; restore it before rerunning its failed rows"
        )


def spool_folder(generation: int) -> str:
    """Where unfinished table files of a generation lie below a local state folder."""
    return f"spool/g{generation:04d}"


@contextmanager
def _open_spool(state: Storage, generation: int) -> Iterator[Path]:
    """A local file to write: on the state's own disk if that is local, so that a rename can publish it."""
    name = f"{uuid.uuid4().hex}.parquet"
    if is_local(state.uri):
        spool = local_path(state.uri) / spool_folder(generation) / name
        spool.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield spool
        finally:
            spool.unlink(missing_ok=True)
    else:
        with tempfile.TemporaryDirectory(prefix="iab-vision-") as folder:
            yield Path(folder) / name
