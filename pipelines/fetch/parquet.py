"""Images inside a Parquet table: their bytes, row by row.

A column of binaries, or Hugging Face's struct<bytes, path>. Rows are read forwards, a few megabytes at a
time; a cursor stays open, so that the next rows of its row group need no second read.
"""

import random
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count, groupby

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from aiohttp import ClientError, ClientResponseError
from obstore.exceptions import BaseError

from pipelines.fetch.files import check_container
from pipelines.fetch.memory import check_size
from pipelines.fetch.retry import FetchError, backoff_s, internal_error, status_of_code
from pipelines.fetch.settings import FetchLimits
from pipelines.fetch.source import ContainerVersion
from pipelines.status import Status
from pipelines.storage.objects import OBJECT_SCHEMES
from pipelines.storage.storage import open_input
from pipelines.storage.uris import is_local, scheme_of

BATCH_BYTES = 8 << 20
"""Payloads in memory at a time, about."""

MAX_GAP = 256
"""Most rows that an idle cursor skips for the next call. Calls that read different parts of a row group would
otherwise take each other's cursors, and each would read the group from its start again."""

IDLE_CURSORS = 17
"""Cursors kept open for the rows that follow: one for each call of a load actor, and one more."""


UNREADABLE = (OSError, BaseError, ClientError, pa.ArrowException, LookupError)
"""What reading a table raises; below pyarrow's reader are obstore (BaseError) and fsspec with aiohttp."""


class Cursor:
    """An open Parquet file, and how far its payloads were read."""

    def __init__(self, container: str, column: str, planned: ContainerVersion | None = None) -> None:
        self.container = container
        self.column = column
        self._planned = planned
        check_container(container, planned)
        # pre_buffer, pyarrow's default, would read whole column chunks of the following row groups too.
        self._file = pq.ParquetFile(open_input(container), buffer_size=1 << 20, pre_buffer=False)
        sizes = (self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups))
        self._starts = list(accumulate(sizes, initial=0))
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._payloads: pa.Array = pa.array([], pa.binary())  # in hand, from `row` on
        self.row = 0

    def reaches(self, row: int) -> bool:
        """Whether reading on is cheapest: the row is the next one, or later in the same row group."""
        end = self._starts[min(bisect_right(self._starts, self.row), len(self._starts) - 1)]
        return bool(self.row <= row < max(end, min(self.row + 2, self._starts[-1])))

    def payload(self, row: int) -> pa.Scalar:
        """The payload of a row, null if there is none. Raises IndexError beyond the last row."""
        if not len(self._payloads) or not self.reaches(row):
            self._seek(row)
        while row >= self.row + len(self._payloads):
            self.row += len(self._payloads)
            self._payloads = self._values(next(self._batches))
            check_container(self.container, self._planned)  # after they were read, not before
        self._payloads = self._payloads[row - self.row :]
        self.row = row
        return self._payloads[0]

    def _seek(self, row: int) -> None:
        if not 0 <= row < self._starts[-1]:
            raise IndexError(f"{self.container} has {self._starts[-1]:,} rows, and row {row:,} was planned")
        group = bisect_right(self._starts, row) - 1
        metadata = self._file.metadata.row_group(group)
        rows = max(1, min(1_024, BATCH_BYTES * metadata.num_rows // max(1, metadata.total_byte_size)))
        kind = self._file.schema_arrow.field(self.column).type
        leaf = f"{self.column}.bytes" if pa.types.is_struct(kind) else self.column
        self._batches = (
            batch
            for number in range(group, self._file.num_row_groups)
            for batch in self._file.iter_batches(rows, row_groups=[number], columns=[leaf])
        )
        self.row = self._starts[group]
        self._payloads = pa.array([], pa.binary())

    def _values(self, batch: pa.RecordBatch) -> pa.Array:
        column = batch.column(0)
        return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


class EmbeddedReader:
    """Owns a few open cursors; safe to use from many threads."""

    def __init__(self) -> None:
        self._idle: list[Cursor] = []
        self._lock = threading.Lock()

    def read(
        self, container: str, column: str, rows: Sequence[int], planned: ContainerVersion | None = None
    ) -> Iterator[pa.Scalar]:
        """Payloads of rows in ascending order. Raises one of UNREADABLE, or FetchError (`source_changed`)."""
        cursor = self._take(container, column, rows[0]) or Cursor(container, column, planned)
        for row in rows:
            yield cursor.payload(row)
        with self._lock:
            self._idle = [*self._idle[1 - IDLE_CURSORS :], cursor]

    def _take(self, container: str, column: str, row: int) -> Cursor | None:
        with self._lock:
            same = [one for one in self._idle if (one.container, one.column) == (container, column)]
            near = [one for one in same if one.reaches(row) and row <= one.row + MAX_GAP]
            if near:
                nearest = max(near, key=lambda cursor: cursor.row)
                self._idle.remove(nearest)
                return nearest
        return None


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """One image's row in a table, and the caller's index of it."""

    container: str
    column: str
    row: int
    index: int
    planned: ContainerVersion | None = field(default=None, compare=False)


def read_embedded(
    reader: EmbeddedReader, places: Sequence[Place], limits: FetchLimits
) -> Iterator[tuple[int, bytes | FetchError]]:
    """Each place's index and payload, table by table in the order of their rows."""
    for _, group in groupby(sorted(places), lambda place: (place.container, place.column)):
        waiting = list(group)
        for attempt in count(1):
            try:
                for payload in _read(reader, waiting):
                    yield waiting.pop(0).index, _outcome(payload, limits.max_bytes)
                break
            except Exception as error:
                failed = _changed(waiting[0]) or _to_fetch_error(error)
                if failed.final or attempt >= limits.max_attempts or not _is_read_once(waiting[0].container):
                    break
                time.sleep(backoff_s(attempt, limits.backoff_s, random.random()))
        for place in waiting:
            yield place.index, failed


def _read(reader: EmbeddedReader, places: Sequence[Place]) -> Iterator[pa.Scalar]:
    first = places[0]
    return reader.read(first.container, first.column, [place.row for place in places], first.planned)


def _changed(place: Place) -> FetchError | None:
    """Whether a table that could not be read is another one by now."""
    try:
        check_container(place.container, place.planned)
    except FetchError as error:
        return error
    except UNREADABLE:
        return None
    return None


def _is_read_once(container: str) -> bool:
    """Whether its requests are not repeated below, as those to an object store are."""
    return not is_local(container) and scheme_of(container) not in OBJECT_SCHEMES


def _outcome(payload: pa.Scalar, max_bytes: int) -> bytes | FetchError:
    if not payload.is_valid:
        return FetchError(Status.EMPTY, "the row holds no bytes")
    n_bytes = pc.binary_length(payload).as_py()
    try:
        check_size(n_bytes, max_bytes)
    except FetchError as error:
        return error
    return bytes(payload.as_py())


def _to_fetch_error(error: Exception) -> FetchError:
    if not isinstance(error, UNREADABLE):
        return internal_error(error)
    if isinstance(error, FileNotFoundError):
        if isinstance(answer := error.__cause__, ClientResponseError):  # fsspec takes any answer for this
            return FetchError(status_of_code(answer.status), f"HTTP {answer.status} {answer.message}")
        return FetchError(Status.NOT_FOUND, "the table does not exist any more")
    if isinstance(error, LookupError):
        return FetchError(Status.NOT_FOUND, str(error))
    if isinstance(error, PermissionError):
        return FetchError(Status.DENIED, "no permission to read the table")
    return FetchError(Status.CONNECTION_FAILED, f"the table cannot be read: {error}")
