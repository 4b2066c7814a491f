"""Rows of a table that name the same URI -> one item each, with all its rows, in flat memory.

Two passes over the table decide and gather. A first pass reduces every URI to 64 bits, on disk; equal
ones make a *leader* (the first row) and its *followers*. A second pass spills the followers' rows to
disk, cut by leader, so that a third, which writes the items, meets them in order. Equal hashes are only
candidates: URIs are compared before rows are joined, so a collision costs a second fetch, never a row.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

MAX_ROWS_PER_ITEM = 100_000
"""An image named by more rows is fetched again for each further hundred thousand: one item is written,
moved and retried as a whole, so a placeholder picture on every page must not make it endless."""

ROWS_PER_SPILL = 500_000
"""Followers per spilled file; one such file is in memory at a time."""

HASH_BUCKETS_LOG2 = 4
"""Hashes are sorted in 2**4 slices by their upper bits, so that sorting takes a sixteenth of their size."""

LEADER = "leader"
"""What the last column of spilled rows is called; a column of the caller's may be called the same."""

Hasher = Callable[[pa.Array], np.ndarray]


def hash_uris(uris: pa.Array) -> np.ndarray:
    """uint64 per URI, the same within one process; equal text gives equal hashes whatever the string type."""
    return pl.Series(pl.from_arrow(uris)).hash(seed=0).to_numpy()  # type: ignore[arg-type]


@dataclass(frozen=True)
class Followers:
    """Rows that repeat an earlier one: `rows` ascending, and the `leaders` that they repeat."""

    rows: np.ndarray
    leaders: np.ndarray


def find_followers(hashes: np.ndarray) -> Followers:
    """Group equal hashes; in each group every `MAX_ROWS_PER_ITEM`-th row leads those after it."""
    found = [_find_in_bucket(hashes, bucket, MAX_ROWS_PER_ITEM) for bucket in range(1 << HASH_BUCKETS_LOG2)]
    rows = np.concatenate([rows for rows, _ in found])
    leaders = np.concatenate([leaders for _, leaders in found])
    order = np.argsort(rows)
    return Followers(rows[order], leaders[order])


def _find_in_bucket(hashes: np.ndarray, bucket: int, cap: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.flatnonzero((hashes >> np.uint64(64 - HASH_BUCKETS_LOG2)) == bucket)
    values = hashes[rows]
    order = np.argsort(values, kind="stable")
    rows, values = rows[order], values[order]
    positions = np.arange(len(rows))
    starts = np.ones(len(rows), bool)
    starts[1:] = values[1:] != values[:-1]
    group_start = np.maximum.accumulate(np.where(starts, positions, 0))
    rank = positions - group_start
    follows = rank % cap != 0
    leader_position = group_start + rank // cap * cap
    return rows[follows], rows[leader_position[follows]]


class HashFile:
    """One uint64 per table row, kept on disk: 8 bytes a row of page cache, not of memory."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / "hashes").open("w+b")

    def append(self, hashes: np.ndarray) -> None:
        hashes.astype(np.uint64, copy=False).tofile(self._file)

    def read(self) -> np.ndarray:
        """All hashes so far, mapped, not loaded."""
        self._file.flush()
        if self._file.tell() == 0:
            return np.empty(0, np.uint64)
        return np.memmap(self._file, np.uint64, mode="r")


class Spill:
    """The followers' rows on disk, cut into segments of consecutive leaders."""

    def __init__(self, followers: Followers, folder: Path) -> None:
        self._followers = followers
        self._folder = folder
        self._writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
        ordered = np.sort(followers.leaders)
        self._bounds = np.unique(ordered[::ROWS_PER_SPILL])
        self._segment = -1
        self._loaded = pa.table({})

    def gather(self, batches: Iterable[tuple[int, pa.RecordBatch]]) -> None:
        """Keep the followers among all rows of the table; `batches` come with their first row's number."""
        for start, batch in batches:
            first, stop = np.searchsorted(self._followers.rows, [start, start + batch.num_rows])
            if first < stop:
                self._keep(
                    batch, start, self._followers.rows[first:stop], self._followers.leaders[first:stop]
                )
        for writer in self._writers.values():
            writer.close()

    def _keep(self, batch: pa.RecordBatch, start: int, rows: np.ndarray, leaders: np.ndarray) -> None:
        kept = batch.take(pa.array(rows - start)).append_column(LEADER, pa.array(leaders))
        segments = self._segment_of(leaders)
        for segment in np.unique(segments):
            part = kept.filter(pa.array(segments == segment))
            if segment not in self._writers:
                self._writers[segment] = pa.ipc.new_stream(self._path(segment), part.schema)
            self._writers[segment].write_batch(part)

    def cuts(self, start: int, stop: int) -> list[int]:
        """Where rows [start, stop) must be cut so that each piece needs one segment only."""
        inside = self._bounds[(self._bounds > start) & (self._bounds < stop)]
        return [start, *inside.tolist(), stop]

    def followers_of(self, start: int, stop: int) -> pa.Table | None:
        """Rows that repeat a leader in [start, stop), which comes last, by leader, then as in the table."""
        segment = int(self._segment_of(np.array([start]))[0])
        if segment not in self._writers:
            return None
        if self._segment != segment:
            with pa.memory_map(str(self._path(segment))) as file:
                spilled = pa.ipc.open_stream(file).read_all()
            order = np.argsort(leaders_of(spilled), kind="stable")
            self._segment, self._loaded = segment, spilled.take(pa.array(order))
        first, end = np.searchsorted(leaders_of(self._loaded), [start, stop])
        return self._loaded.slice(first, end - first) if first < end else None

    def is_follower(self, start: int, stop: int) -> np.ndarray:
        """bool per row of [start, stop)."""
        mask = np.zeros(stop - start, bool)
        first, end = np.searchsorted(self._followers.rows, [start, stop])
        mask[self._followers.rows[first:end] - start] = True
        return mask

    def _segment_of(self, leaders: np.ndarray) -> np.ndarray:
        return np.maximum(np.searchsorted(self._bounds, leaders, side="right") - 1, 0)

    def _path(self, segment: int) -> Path:
        return self._folder / f"followers-{segment}.arrow"


def leaders_of(spilled: pa.Table) -> np.ndarray:
    """The leader that each spilled row repeats: the last column, found by its place and not by its name."""
    leaders: np.ndarray = spilled.column(spilled.num_columns - 1).to_numpy()
    return leaders


def group(start: int, batch: pa.RecordBatch, spill: Spill) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """Rows of `batch` that lead, with all that follow them, as (rows, offsets of the items in them).

    Args:
        start: number of the batch's first row in the table.
        batch: columns of the table, `uri` among them.
    """
    cuts = spill.cuts(start, start + batch.num_rows)
    for first, stop in pairwise(cuts):
        leads = ~spill.is_follower(first, stop)
        leaders = pa.Table.from_batches([batch.slice(first - start, stop - first)])
        if not leads.all():
            leaders = leaders.filter(pa.array(leads))
        followers = spill.followers_of(first, stop)
        if followers is None:
            yield leaders, np.arange(leaders.num_rows + 1)
        else:
            yield _join(leaders, np.flatnonzero(leads) + first, followers)


def _join(leaders: pa.Table, numbers: np.ndarray, followers: pa.Table) -> tuple[pa.Table, np.ndarray]:
    rows = pa.concat_tables([leaders, followers.remove_column(followers.num_columns - 1)])
    keys = np.concatenate([numbers, leaders_of(followers)])
    led_by = np.searchsorted(numbers, keys)
    uris = rows["uri"].combine_chunks()
    collided = pc.not_equal(uris, uris.take(pa.array(led_by))).to_numpy(zero_copy_only=False)
    order = np.lexsort((np.arange(len(keys)), collided, keys))
    keys, collided = keys[order], collided[order]
    starts = np.ones(len(keys), bool)
    starts[1:] = (keys[1:] != keys[:-1]) | collided[1:]
    return rows.take(pa.array(order)), np.append(np.flatnonzero(starts), len(keys))
