"""Rows of a table that name the same URI -> one item each, with all its rows, in flat memory.

The table is read three times. DuckDB hashes every URI and finds the rows whose hash occurs once: they need
no grouping. The others are written to a local file, and DuckDB, which spills to disk, groups them by the
whole URI, so a collision of hashes joins nothing. The third reading yields the items in the order of their
first rows. DuckDB sees row numbers and URIs only; all other values stay Arrow and keep their exact types.
"""

import mmap
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

MAX_ROWS_PER_ITEM = 100_000
"""An image named by more rows is fetched again for each further hundred thousand: one item is written,
moved and retried as a whole, so a placeholder picture on every page must not make it endless."""

ROWS_AT_ONCE = 65_536
"""Repeated rows that are gathered together; more only where a single item has more."""

SETTINGS: dict[str, Any] = {"memory_limit": "96MB", "threads": 1, "preserve_insertion_order": False}
"""DuckDB's. A second thread makes no query here faster. Whatever the settings, a join keeps no order, and the
sizes of the batches that a result comes in depend on the threads: nothing here may follow from either."""

REPEATED = "SELECT row FROM hashes WHERE hash IN (SELECT hash FROM hashes GROUP BY hash HAVING count(*) > 1)"

GROUPED = """
WITH firsts AS (SELECT uri, min(row) AS first FROM repeated GROUP BY uri),
parts AS (
    SELECT position, row, first, (row_number() OVER (PARTITION BY first ORDER BY row) - 1) // $cap AS part
    FROM repeated JOIN firsts USING (uri)
)
SELECT position, min(row) OVER (PARTITION BY first, part) AS leader FROM parts ORDER BY leader, row
"""

NO_GROUPS = np.empty((2, 0), np.int64)

Batches = Iterator[pa.RecordBatch]
Items = tuple[pa.Table, np.ndarray]
"""Rows, and the offsets of the items in them."""


def group_rows(
    read: Callable[[], Batches], read_uris: Callable[[], Batches], folder: Path
) -> Iterator[Items]:
    """Every row of a table, in items of one URI each, in the order of the items' first rows.

    Args:
        read: starts a reading of the table; its column `uri` has no nulls.
        read_uris: starts a reading of that column alone.
        folder: local, for what does not fit in memory.
    """
    with duckdb.connect(config={**SETTINGS, "temp_directory": str(folder)}) as database:
        repeated = _find_repeated(database, read_uris())
        spool = _Spool(folder / "repeated.arrow", _split_off(database, read(), repeated))
        groups = _Groups(database)
        start = 0
        for batch in read():
            alone = start + np.flatnonzero(~repeated[start : start + batch.num_rows])
            for positions, leaders in groups.led_before(start + batch.num_rows):
                before, alone = np.split(alone, [np.searchsorted(alone, leaders[-1])])
                order = np.argsort(positions)
                rows = spool.take(positions[order])
                yield _merge(batch, start, before, (rows, leaders[order]))
            if len(alone):
                rows = pa.Table.from_batches([batch.take(pa.array(alone - start))])
                yield rows, np.arange(len(alone) + 1)
            start += batch.num_rows


def _find_repeated(database: duckdb.DuckDBPyConnection, uris: Batches) -> np.ndarray:
    """bool per row: whether its URI's hash occurs again, as that of every repeated URI does."""
    n_rows = 0
    database.execute("CREATE TABLE hashes (row BIGINT, hash UBIGINT)")
    for batch in uris:
        rows = np.arange(n_rows, n_rows + batch.num_rows)
        database.register("batch", pa.table({"row": rows, "uri": batch.column(0)}))
        database.execute("INSERT INTO hashes SELECT row, hash(uri) FROM batch")
        n_rows += batch.num_rows
    repeated = np.zeros(n_rows, bool)
    for found in database.sql(REPEATED).to_arrow_reader(ROWS_AT_ONCE):
        repeated[found.column(0).to_numpy()] = True
    database.execute("DROP TABLE hashes")
    return repeated


def _split_off(database: duckdb.DuckDBPyConnection, batches: Batches, repeated: np.ndarray) -> Batches:
    """The repeated rows; their positions among themselves, numbers and URIs go into the table `repeated`."""
    start = position = 0
    database.execute("CREATE TABLE repeated (position BIGINT, row BIGINT, uri VARCHAR)")
    for batch in batches:
        rows = np.flatnonzero(repeated[start : start + batch.num_rows])
        kept = batch.take(pa.array(rows))
        positions = np.arange(position, position + len(rows))
        named = pa.table({"position": positions, "row": start + rows, "uri": kept.column("uri")})
        database.register("batch", named)
        database.execute("INSERT INTO repeated FROM batch")
        start += batch.num_rows
        position += len(rows)
        yield kept


class _Spool:
    """Rows in a local Arrow file; memory holds none of them."""

    def __init__(self, path: Path, batches: Batches) -> None:
        """Write all rows."""
        writer = None
        sizes = [0]
        with path.open("wb") as file:
            for batch in batches:
                writer = writer or pa.ipc.new_stream(file, batch.schema)
                writer.write_batch(batch)
                sizes.append(batch.num_rows)
            if writer:
                writer.close()
        self._starts = np.cumsum(sizes)
        self._path = path

    @cached_property
    def _mapped(self) -> mmap.mmap:
        with self._path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        return list(pa.ipc.open_stream(pa.py_buffer(self._mapped)))

    def take(self, positions: np.ndarray) -> pa.Table:
        """The rows at `positions`, which ascend. pyarrow would copy a whole column of text, so by batch."""
        cuts = np.searchsorted(positions, self._starts)
        pieces = []
        for batch, start, (first, stop) in zip(self._batches, self._starts, pairwise(cuts), strict=False):
            if first < stop:
                pieces.append(batch.take(pa.array(positions[first:stop] - start)))
                # Positions are scattered over all batches: what was read of each would count as our memory.
                self._mapped.madvise(mmap.MADV_DONTNEED)
        return pa.Table.from_batches(pieces)


class _Groups:
    """The repeated rows' positions and leaders in the order of the leaders, read once and forward."""

    def __init__(self, database: duckdb.DuckDBPyConnection) -> None:
        found = database.sql(GROUPED, params={"cap": MAX_ROWS_PER_ITEM}).to_arrow_reader(ROWS_AT_ONCE)
        self._chunks = _whole_groups(found)
        self._ahead = NO_GROUPS

    def led_before(self, stop: int) -> Iterator[np.ndarray]:
        """Whole groups whose leader is below row `stop`, some at a time, as int64 [2, rows]."""
        while True:
            if not self._ahead.size:
                self._ahead = next(self._chunks, NO_GROUPS)
            cut = int(np.searchsorted(self._ahead[1], stop))
            if not cut:
                return
            found, self._ahead = self._ahead[:, :cut], self._ahead[:, cut:]
            yield found


def _whole_groups(found: Batches) -> Iterator[np.ndarray]:
    """Positions and leaders in pieces of `ROWS_AT_ONCE` less the group cut there, or of one larger group."""
    rest = NO_GROUPS
    for batch in found:
        pairs = np.stack([batch.column(0).to_numpy(), batch.column(1).to_numpy()])
        rest = np.concatenate([rest, pairs], axis=1)
        while rest.shape[1] > ROWS_AT_ONCE:
            cut = int(np.searchsorted(rest[1], rest[1, ROWS_AT_ONCE]))
            cut = cut or int(np.searchsorted(rest[1], rest[1, 0], side="right"))
            if cut == rest.shape[1]:
                break
            yield rest[:, :cut]
            rest = rest[:, cut:]
    if rest.size:
        yield rest


def _merge(
    batch: pa.RecordBatch, start: int, alone: np.ndarray, groups: tuple[pa.Table, np.ndarray]
) -> Items:
    """The rows `alone` of the batch, and groups (rows, leaders), in the order of the leading rows."""
    repeated, leaders = groups
    keys = np.concatenate([alone, leaders])
    order = np.argsort(keys, kind="stable")
    places = np.concatenate([alone - start, batch.num_rows + np.arange(len(leaders))])
    both = pa.concat_tables([pa.Table.from_batches([batch]), repeated]).unify_dictionaries().combine_chunks()
    return both.take(pa.array(places[order])), np.append(
        np.flatnonzero(np.diff(keys[order], prepend=-1)), len(keys)
    )
