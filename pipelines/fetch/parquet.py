"""Images inside a Parquet table: their bytes, row by row.

A column of binaries, or Hugging Face's struct<bytes, path>. Parquet is read forwards from the start of a row
group, so the calls that want rows of one group share a cursor: what it passes on the way to one call's rows
is kept for the others, and each group is read about once.
"""

import logging
import random
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
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
from pipelines.fetch.source import ContainerVersion, Source
from pipelines.messages import redact
from pipelines.status import Status
from pipelines.storage.objects import OBJECT_SCHEMES
from pipelines.storage.storage import open_input
from pipelines.storage.uris import is_local, scheme_of

log = logging.getLogger(__name__)

BATCH_BYTES = 8 << 20
"""Payloads read at a time, about, if memory allows it."""

SHARE_READ = 8
"""Of the memory of a cursor, a batch is one part in so many: decoding it takes several times its size."""

OPEN_CURSORS = 17
"""Cursors kept open: one for each call of a load actor, and one more."""

UNREADABLE = (OSError, BaseError, ClientError, pa.ArrowException, LookupError)
"""What reading a table raises; below pyarrow's reader are obstore (BaseError) and fsspec with aiohttp."""


class Cursor:
    """An open Parquet file, read in one row group at a time, and what was read there and not yet taken."""

    def __init__(
        self,
        container: str,
        column: str,
        planned: ContainerVersion | None,
        batch_bytes: int,
        footer: pq.FileMetaData | None = None,
    ) -> None:
        self.place = (container, column)
        self.users = 0
        """Calls that read from it now; another row group only where there are none."""
        self.broken = False
        self._planned = planned
        self._batch_bytes = batch_bytes
        check_container(container, planned)
        # pre_buffer, pyarrow's default, would read whole column chunks of the following row groups too.
        self._file = pq.ParquetFile(
            open_input(container), metadata=footer, buffer_size=1 << 20, pre_buffer=False
        )
        self.footer: pq.FileMetaData = self._file.metadata
        sizes = (self.footer.row_group(group).num_rows for group in range(self.footer.num_row_groups))
        self._starts = list(accumulate(sizes, initial=0))
        self._group = range(0)
        self.read_to = 0
        """Rows of the group before this one were read."""
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._kept: dict[range, tuple[pa.Array, set[int]]] = {}
        """Batches by their rows, with the rows of each that were taken."""
        self._lock = threading.Lock()

    def serves(self, row: int) -> bool:
        """Whether the row is in its row group."""
        return row in self._group and not self.broken

    @property
    def spent(self) -> bool:
        """Whether nothing is left to be taken."""
        return self.read_to == self._group.stop and not self._kept

    @property
    def kept_bytes(self) -> int:
        """Bytes of the batches that were read and not yet taken whole."""
        return sum(payloads.nbytes for payloads, _ in list(self._kept.values()))

    def seek(self, row: int) -> None:
        """Go to the start of the row group of this row. Raises IndexError beyond the last row."""
        if not 0 <= row < self._starts[-1]:
            raise IndexError(f"{self.place[0]} has {self._starts[-1]:,} rows, and row {row:,} was planned")
        number = bisect_right(self._starts, row) - 1
        metadata = self.footer.row_group(number)
        rows = max(1, min(1_024, self._batch_bytes * metadata.num_rows // max(1, metadata.total_byte_size)))
        kind = self._file.schema_arrow.field(self.place[1]).type
        leaf = f"{self.place[1]}.bytes" if pa.types.is_struct(kind) else self.place[1]
        self._batches = self._file.iter_batches(rows, row_groups=[number], columns=[leaf])
        self._group = range(self._starts[number], self._starts[number + 1])
        self.read_to = self._group.start
        self._kept.clear()

    def payload(self, row: int) -> pa.Scalar:
        """The payload of a row of its group, null if there is none."""
        with self._lock:
            if row < self.read_to and not any(row in rows for rows in self._kept):  # taken or dropped
                self.seek(row)
            try:
                while row >= self.read_to:
                    self._read_batch()
            except BaseException:
                self.broken = True
                raise
            return self._take(row)

    def drop(self) -> None:
        """Forget what is kept, unless a call is reading; who still wants it reads the group once more."""
        if self._lock.acquire(blocking=False):
            self._kept.clear()
            self._lock.release()

    def _read_batch(self) -> None:
        column = next(self._batches).column(0)
        check_container(self.place[0], self._planned)  # after it was read, not before
        payloads = pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column
        rows = range(self.read_to, self.read_to + len(payloads))
        self._kept[rows] = payloads, set()
        self.read_to = rows.stop
        if rows.stop == self._group.stop:
            self._batches = iter(())  # or the reader would keep the last page

    def _take(self, row: int) -> pa.Scalar:
        rows = next(rows for rows in self._kept if row in rows)
        payloads, taken = self._kept[rows]
        taken.add(row)
        if len(taken) == len(rows):
            del self._kept[rows]
        return payloads[row - rows.start]


class EmbeddedReader:
    """Owns a few open cursors; safe to use from many threads.

    What cursors keep for calls to come is at most `max_bytes` and one row group.
    """

    def __init__(self, max_bytes: int = FetchLimits.max_buffered_bytes) -> None:
        self._max_bytes = max_bytes
        self._batch_bytes = min(BATCH_BYTES, max_bytes // (SHARE_READ * OPEN_CURSORS))
        self._opening = [threading.Lock() for _ in range(OPEN_CURSORS)]
        self._open: list[Cursor] = []
        """The last used at the end."""
        self._lock = threading.Lock()

    def read(
        self, container: str, column: str, rows: Sequence[int], planned: ContainerVersion | None = None
    ) -> Iterator[pa.Scalar]:
        """Payloads of rows in ascending order. Raises one of UNREADABLE, or FetchError (`source_changed`)."""
        waiting = list(rows)
        while waiting:
            cursor = self._acquire(container, column, waiting[0], planned)
            try:
                while waiting and cursor.serves(waiting[0]):
                    read_to = cursor.read_to
                    yield cursor.payload(waiting.pop(0))
                    if cursor.read_to != read_to:
                        self._drop_excess(cursor)
            finally:
                with self._lock:
                    cursor.users -= 1

    def _acquire(self, container: str, column: str, row: int, planned: ContainerVersion | None) -> Cursor:
        """A cursor on the row's group: one that is there, else an idle one, else one more."""
        with self._opening[hash(container) % OPEN_CURSORS]:
            with self._lock:
                if found := self._find(container, column, row):
                    return found
                # A table that is not held to its planned version may be another one by now.
                same = [one for one in self._open if one.place[0] == container and planned]
            opened = Cursor(container, column, planned, self._batch_bytes, same[0].footer if same else None)
            if not same:
                self._warn_of_groups(opened)
            with self._lock:
                idle = [cursor for cursor in self._open if not cursor.users]
                for cursor in idle[: max(0, len(self._open) + 1 - OPEN_CURSORS)]:
                    self._open.remove(cursor)
                self._open.append(opened)
                return self._use(opened, row)

    def _warn_of_groups(self, opened: Cursor) -> None:
        sizes = (opened.footer.row_group(n).total_byte_size for n in range(opened.footer.num_row_groups))
        if (largest := max(sizes, default=0)) > self._max_bytes:
            log.warning(
                "a row group of %s has %.0f MB: reading it may take that much memory over the %.0f MB of "
                "--fetch.max-buffered-bytes; write the table with smaller row groups",
                redact(opened.place[0]),
                largest / 1e6,
                self._max_bytes / 1e6,
            )

    def _find(self, container: str, column: str, row: int) -> Cursor | None:
        self._open = [cursor for cursor in self._open if not cursor.broken]
        same = [cursor for cursor in self._open if cursor.place == (container, column)]
        if serving := [cursor for cursor in same if cursor.serves(row)]:
            return self._use(serving[0], row)
        idle = [cursor for cursor in same if not cursor.users]
        spent = [cursor for cursor in idle if cursor.spent]
        if spent or (idle and len(self._open) >= OPEN_CURSORS):
            return self._use((spent or idle)[0], row)
        return None

    def _use(self, cursor: Cursor, row: int) -> Cursor:
        if not cursor.serves(row):
            cursor.seek(row)
        self._open.remove(cursor)
        self._open.append(cursor)
        cursor.users += 1
        return cursor

    def _drop_excess(self, current: Cursor) -> None:
        """Keep at most so much besides the row group that is being read; the longest unused goes first."""
        with self._lock:
            others = [(cursor, cursor.kept_bytes) for cursor in self._open if cursor is not current]
        excess = sum(kept for _, kept in others) - self._max_bytes
        for cursor, kept in others:
            if excess <= 0:
                return
            cursor.drop()
            excess -= kept


def read_embedded(
    reader: EmbeddedReader, sources: Sequence[tuple[int, Source]], limits: FetchLimits
) -> Iterator[tuple[int, bytes | FetchError]]:
    """Each source's index, as given with it, and payload, table by table in the order of their rows."""
    ordered = sorted(sources, key=lambda one: (*_table_of(one[1]), one[1].offset or 0))
    for (container, column), group in groupby(ordered, lambda one: _table_of(one[1])):
        waiting = list(group)
        planned = waiting[0][1].planned
        for attempt in count(1):
            try:
                rows = [source.offset or 0 for _, source in waiting]
                for payload in reader.read(container, column, rows, planned):
                    yield waiting.pop(0)[0], _outcome(payload, limits.max_bytes)
                break
            except Exception as error:
                failed = _changed(container, planned) or _to_fetch_error(error)
                if failed.final or attempt >= limits.max_attempts or not _is_read_once(container):
                    break
                time.sleep(backoff_s(attempt, limits.backoff_s, random.random()))
        for index, _ in waiting:
            yield index, failed


def _table_of(source: Source) -> tuple[str, str]:
    """The table and the column that hold an image."""
    return source.location, source.payload_column or ""


def _changed(container: str, planned: ContainerVersion | None) -> FetchError | None:
    """Whether a table that could not be read is another one by now."""
    try:
        check_container(container, planned)
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
