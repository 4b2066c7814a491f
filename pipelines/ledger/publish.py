"""Recorded parts -> the published table, its `_SUCCESS`, and a cleared-up state folder; safe to repeat.

    1  the ledger is closed to new parts, which fixes which parts make up which file
    2  a `_SUCCESS` that lists other files is removed
    3  file by file: written under its final name in one atomic put, then entered in the ledger
    4  `published` is entered; then `_SUCCESS` is written; then parts and superseded files are removed

The same ledger gives the same bytes, so a step that a crash interrupted is repeated with the same result. A
rerun of failed rows replaces only the files that hold such rows. In a plain table each is replaced at once
under its old name: a reader sees every row exactly once at any moment. In a table of generations it gets a
new name, and the old file stays until `_SUCCESS` lists the new one.

Why parts are read and encoded again, not moved: part names are random and part sizes follow batches and
retries, while a table wants deterministic names, files of a chosen size and row groups for column scans;
parts also have a column that is not published. It costs 1.7 s per million rows.

A driver may be paused between any two steps, wake long after another has gone on, and must not write an old
file over a newer one. Object stores put a file only in place of what was there before the ledger was checked.
Locally a file is renamed out of its generation's spool folder, which is removed at 4. A file system with
neither (`fenced` is False), a file beyond `SINGLE_PUT_BYTES`, and the removal at 2 leave the moment between
check and write: at 2 the worst is a whole table without its marker, which the same command writes again. An
object store also accepts a late put of a superseded file that was removed: `_SUCCESS` does not list it, and
the same command removes it.
"""

import hashlib
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.inventory.plan import Plan
from pipelines.ledger.entries import LedgerState, Part, Phase, TableFile
from pipelines.ledger.item_set import ItemSet, Range, concat, ids_of, join_adjacent, ranges_of
from pipelines.ledger.layout import (
    PLAIN,
    SUCCESS,
    TableLayout,
    find_superseded,
    rename_file,
)
from pipelines.ledger.ledger import Ledger
from pipelines.ledger.parts import count_values, is_passing, parts_folder, read_part
from pipelines.ledger.republish import list_row_items, replace_rows
from pipelines.messages import InputError, JobFailed
from pipelines.status import TRANSIENT
from pipelines.storage.storage import Storage, sha256_of
from pipelines.storage.uris import AlreadyExists, is_local, local_path

ROWS_PER_GROUP = 65_536
"""Rows of a Parquet row group: large enough for column scans, small enough to hold one in memory."""


@dataclass(frozen=True)
class FileContent:
    """A table file before it is written."""

    name: str
    items: Sequence[Range]
    tables: Iterable[pa.Table]
    replaces: TableFile | None = None


def publish(
    ledger: Ledger,
    plan: Plan,
    state: Storage,
    table: Storage,
    *,
    rows_per_file: int,
    layout: TableLayout = PLAIN,
) -> None:
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
        refuse_foreign_files(ledger, table, layout)
        with ledger.detect_rival():
            _withdraw_marker(ledger, table, layout)
            for content in files_to_write(ledger, plan, state, table, layout):
                _write_file(content, layout.schema(plan.carried), ledger, state, table)
        ledger.publish()
    finish(ledger, state, table, layout)


def finish(ledger: Ledger, state: Storage, table: Storage, layout: TableLayout = PLAIN) -> None:
    """What remains once the ledger says `published`: the marker, and removing what is no longer needed."""
    _write_marker(ledger, state, table, layout)
    if superseded := find_superseded([entry.path for entry in table.list()], ledger.state, layout):
        table.delete(*superseded)
    for generation in range(1, ledger.state.generation + 1):
        for folder in (parts_folder(generation), spool_folder(generation)):
            state.delete(*[entry.path for entry in state.list(folder)])


def _withdraw_marker(ledger: Ledger, table: Storage, layout: TableLayout) -> None:
    """Remove a marker that lists other files than the table is about to have; an empty one may stay."""
    if _read_marker(table) not in (None, layout.encode_marker(ledger.state)):
        ledger.check()
        table.delete(SUCCESS)


def _write_marker(ledger: Ledger, state: Storage, table: Storage, layout: TableLayout) -> None:
    """Write the marker, unless another driver that finishes the same generation was quicker."""
    marker = layout.encode_marker(ledger.state)
    if _read_marker(table) == marker:
        return
    with _open_spool(state, ledger.state.generation) as spool:
        try:
            spool.write_bytes(marker)
            seen = table.version(SUCCESS)
            ledger.check()
            table.put_file_over(SUCCESS, spool, seen)
        except (FileNotFoundError, AlreadyExists):
            ledger.check()
            if _read_marker(table) != marker:
                raise


def _read_marker(table: Storage) -> bytes | None:
    try:
        return table.read(SUCCESS)
    except FileNotFoundError:
        return None


def find_failed_items(ledger: Ledger, plan: Plan, table: Storage) -> Sequence[Range]:
    """The items of a published table whose rows failed for passing reasons."""
    failed = ItemSet(plan.n_items)
    for file in ledger.state.files.values():
        if any(status.value in file.statuses for status in TRANSIENT):
            with ledger.detect_rival():  # a rerun of another driver may have superseded the file
                rows = pq.ParquetFile(table.open_input(file.name)).read(columns=["status"])
            passing = is_passing(rows).to_numpy()
            failed.add(ranges_of(np.unique(list_row_items(file.items, plan)[passing])))
    return failed.present([(0, plan.n_items)])


def refuse_foreign_files(ledger: Ledger, table: Storage, layout: TableLayout = PLAIN) -> None:
    """Raise InputError if readers of the table would see files that are not this table's."""
    names = [entry.path for entry in table.list()]
    ours = {*ledger.state.files, *find_superseded(names, ledger.state, layout)}
    if ledger.state.phase is Phase.PUBLISHING:
        ours |= _name_new_files(ledger.state, layout)
    foreign = [name for name in names if name not in ours]
    if any(map(_is_visible, foreign)):
        ledger.check()  # they may be a successor's
    _refuse_visible(table, foreign)


def refuse_table_without_ledger(state: Storage, table: Storage) -> None:
    """Raise InputError if there are table files and no ledger, before anything is written next to them."""
    if not state.list("ledger"):
        _refuse_visible(table, [entry.path for entry in table.list()])


def _refuse_visible(table: Storage, names: Iterable[str]) -> None:
    if foreign := [name for name in names if _is_visible(name)]:
        raise InputError(
            f"{table.uri} holds files that are not of this run and that readers would count too "
            f"({len(foreign)}, as {foreign[0]}); move them away or choose another output folder"
        )


def _is_visible(path: str) -> bool:
    """Whether a reader of the folder would take the file for data."""
    return not path.rpartition("/")[2].startswith((".", "_"))


def files_to_write(
    ledger: Ledger, plan: Plan, state: Storage, table: Storage, layout: TableLayout = PLAIN
) -> Iterator[FileContent]:
    """The table files that this generation has yet to write, in order."""
    generation = ledger.state.generation
    if ledger.state.reopened:
        for file in _stale_files(ledger.state):
            rows = replace_rows(file, ledger, plan, state, table, layout)
            yield FileContent(rename_file(file, generation, layout), file.items, rows, replaces=file)
        return
    for number, parts in enumerate(assign_parts(ledger.state)):
        name = layout.name_file(number, generation)
        if name not in ledger.state.files:
            items = join_adjacent(concat(part.items for part in parts))
            rows = (layout.complete(read_part(part, state)) for part in parts)
            yield FileContent(name, items, rows)


def _name_new_files(state: LedgerState, layout: TableLayout) -> set[str]:
    """The names that this generation writes, of which some may be there already."""
    if state.reopened:
        return {rename_file(file, state.generation, layout) for file in _stale_files(state)}
    return {layout.name_file(number, state.generation) for number in range(len(assign_parts(state)))}


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


def _write_file(
    content: FileContent, fields: pa.Schema, ledger: Ledger, state: Storage, table: Storage
) -> None:
    """Write one table file under its final name in one atomic put, and enter it in the ledger.

    Raises:
        JobFailed: the file that it replaces is not the one that the ledger lists.
        AlreadyExists: another driver has written the file meanwhile.
    """
    generation = ledger.state.generation
    with _open_spool(state, generation) as spool:
        file = _encode_file(content, fields, generation, spool)
        seen = table.version(content.name)
        # After `version`: what was seen is then not a successor's. After the spool file was written: a
        # successor that has published removes it, and the put fails.
        ledger.check()
        _refuse_damaged(content.replaces, file.sha256, table)
        table.put_file_over(content.name, spool, seen)
    ledger.record_file(file, replaces=content.replaces.name if content.replaces else None)


def _encode_file(content: FileContent, fields: pa.Schema, generation: int, spool: Path) -> TableFile:
    """Write one table file to the spool; the same content gives the same bytes."""
    statuses: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    with pq.ParquetWriter(spool, fields, compression="zstd") as writer:
        for group in row_groups(content.tables, fields):
            writer.write_table(group, row_group_size=ROWS_PER_GROUP)
            statuses.update(count_values(group["status"]))
            labels.update(count_values(group["top_id"]))
    with spool.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return TableFile(
        name=content.name,
        sha256=sha256,
        bytes=spool.stat().st_size,
        items=content.items,
        rows=statuses.total(),
        statuses=dict(statuses),
        labels=dict(labels),
        generation=generation,
    )


def row_groups(
    tables: Iterable[pa.Table], fields: pa.Schema, size: int = ROWS_PER_GROUP
) -> Iterator[pa.Table]:
    """The same rows in full groups, however they were cut before: equal rows give equal bytes."""
    waiting = fields.empty_table()
    for table in tables:
        waiting = pa.concat_tables([waiting, table.select(fields.names).cast(fields)])
        while waiting.num_rows >= size:
            yield waiting.slice(0, size).combine_chunks()
            waiting = waiting.slice(size)
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
    """Folder of a generation's unfinished table files, below a local state folder."""
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
