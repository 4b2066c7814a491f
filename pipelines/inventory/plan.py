"""The frozen work list: Parquet files of items, one per distinct image, each with the rows it answers for.

    state/plan/plan-<fingerprint>-00000.parquet …
    state/plan/plan.json  <- last, created once: counts, checksums, the carried columns' schema

`item_id` numbers the items 0 … n-1 in plan order; every later step refers to items by it. Writing is
deterministic, so two drivers that plan one inventory at once write the same bytes.
"""

import base64
import hashlib
import json
import tempfile
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.messages import InputError
from pipelines.storage.storage import Storage, open_storage
from pipelines.storage.uris import AlreadyExists

PLAN_JSON = "plan/plan.json"
FORMAT_VERSION = 4
"""Format 1 numbered the items in a column `row_id` (iab-vision 0.1); 2 had no `validator`."""
ITEMS_PER_GROUP = 16_384
ROWS_PER_GROUP = 65_536
"""A row group is read as a whole by whoever needs one item of it: 16k items, or fewer if they fan out far."""
ITEMS_PER_FILE = 250_000
LOCATION = pa.schema(
    [
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("container", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("payload_column", pa.string()),
        pa.field("validator", pa.string()),
    ]
)
"""Where an item's bytes are: at `uri`; or at `container` instead; there in bytes [offset, offset + length);
or in row `offset` of its Parquet column `payload_column`. `validator` is what the inventory says that changes
with the bytes, if anything."""


class NoPlan(InputError):
    """The folder holds no finished plan."""


@dataclass(frozen=True)
class PlanFile:
    """One file of the plan, its path below the state folder."""

    path: str
    items: int
    rows: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class FoundFile:
    """One file of the inventory and what tells whether it has changed: its ETag or modification time."""

    uri: str
    size_bytes: int
    version: str


@dataclass(frozen=True)
class Origin:
    """What a plan was frozen from."""

    inventory: str
    """Its URI, without secrets."""
    base: str
    """The folder that its relative URIs start from."""
    fingerprint: str


@dataclass(frozen=True)
class Plan:
    """A finished plan; small, picklable, readable on any machine that reaches the state folder."""

    state_uri: str
    origin: Origin
    hash: str
    """sha256 over the files' checksums and the carried schema: what a resumed run must agree on."""
    n_items: int
    n_rows: int
    carried: pa.Schema
    files: tuple[PlanFile, ...]
    containers: tuple[FoundFile, ...]
    """The files that hold several images each (tars, Parquet), as they were when planned."""

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate((file.items for file in self.files), initial=0))

    def read(self, start: int, stop: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Items [start, stop) in order; all columns, or those named. An `image_id` not given is the URI.

        Raises:
            IndexError: the range is not within the plan.
        """
        return self.items([(start, stop)], columns)

    def items(
        self, ranges: Sequence[tuple[int, int]], columns: Sequence[str] | None = LOCATION.names
    ) -> pa.Table:
        """Items of several ranges, in the order given; by default what is needed to fetch them."""
        wanted = tuple(columns) if columns is not None else tuple(item_schema(self.carried).names)
        pieces = [piece for start, stop in ranges for piece in self._pieces(start, stop, wanted)]
        schema = pa.schema([item_schema(self.carried).field(name) for name in wanted])
        return pa.concat_tables([schema.empty_table(), *pieces]).combine_chunks()

    def _pieces(self, start: int, stop: int, columns: tuple[str, ...]) -> Iterator[pa.Table]:
        if not 0 <= start <= stop <= self.n_items:
            raise IndexError(f"items {start} to {stop} are not within the plan's {self.n_items}")
        while start < stop:
            index = bisect_right(self._starts, start) - 1
            file_start = self._starts[index]
            group, group_start = _group_at(self.state_uri, self.files[index], start - file_start)
            table = _read_group(self.state_uri, self.files[index], group, columns)
            first = start - file_start - group_start
            piece = table.slice(first, min(stop - start, table.num_rows - first))
            start += piece.num_rows
            yield piece


def item_schema(carried: pa.Schema) -> pa.Schema:
    """The schema of every plan file."""
    row = pa.struct([pa.field("image_id", pa.string()), *carried])
    return pa.schema([*LOCATION, pa.field("table_rows", pa.list_(row), nullable=False)])


_reading = threading.Lock()


@lru_cache(maxsize=4)
def _file(state_uri: str, file: PlanFile) -> tuple[pq.ParquetFile, list[int]]:
    """The open file and the first item of each of its row groups."""
    parquet = pq.ParquetFile(open_storage(state_uri).open_input(file.path), pre_buffer=True)
    sizes = (parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups))
    return parquet, list(accumulate(sizes, initial=0))


def _group_at(state_uri: str, file: PlanFile, item: int) -> tuple[int, int]:
    with _reading:
        starts = _file(state_uri, file)[1]
    group = bisect_right(starts, item) - 1
    return group, starts[group]


def _read_group(state_uri: str, file: PlanFile, group: int, columns: tuple[str, ...]) -> pa.Table:
    with _reading:  # one row group serves many chunks: a second thread finds it in the cache
        return _cached_group(state_uri, file, group, columns)


@lru_cache(maxsize=6)
def _cached_group(state_uri: str, file: PlanFile, group: int, columns: tuple[str, ...]) -> pa.Table:
    needed = list(dict.fromkeys([*columns, "uri"])) if "table_rows" in columns else list(columns)
    table = _file(state_uri, file)[0].read_row_group(group, columns=needed).combine_chunks()
    if "table_rows" in columns:
        rows = _fill_image_ids(table["table_rows"].combine_chunks(), table["uri"].combine_chunks())
        table = table.set_column(needed.index("table_rows"), table.schema.field("table_rows"), rows)
    return table.select(list(columns))


def _fill_image_ids(rows: pa.ListArray, uris: pa.Array) -> pa.ListArray:
    """An `image_id` that was not given is the item's URI; files leave it null rather than say it twice."""
    flat = rows.flatten()
    image_ids = flat.field("image_id")
    if image_ids.null_count:
        image_ids = pc.coalesce(image_ids, uris.take(pc.list_parent_indices(rows)))
    others = [flat.field(index) for index in range(1, flat.type.num_fields)]
    filled = pa.StructArray.from_arrays([image_ids, *others], fields=list(flat.type))
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(rows.value_lengths().to_numpy(), out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), filled, type=rows.type)


def write_plan(
    items: Iterable[pa.Table],
    state: Storage,
    *,
    carried: pa.Schema,
    origin: Origin,
    containers: Sequence[FoundFile] = (),
) -> Plan:
    """Write items (the columns of `item_schema` without `item_id`) and, last, `plan.json`.

    Raises:
        InputError: meanwhile another driver froze a different plan there.
    """
    files = list(_write_files(items, state, item_schema(carried), origin.fingerprint))
    described = {
        "format_version": FORMAT_VERSION,
        **asdict(origin),
        "hash": hash_of(files, carried),
        "n_items": sum(file.items for file in files),
        "n_rows": sum(file.rows for file in files),
        "carried_columns": [str(field) for field in carried],
        "carried": base64.b64encode(carried.serialize().to_pybytes()).decode(),
        "files": [asdict(file) for file in files],
        "containers": [asdict(file) for file in containers],
    }
    try:
        state.create(PLAN_JSON, json.dumps(described, indent=1).encode())
    except AlreadyExists:
        if open_plan(state).hash != described["hash"]:
            raise InputError(
                f"another run has just planned something else under {state.uri}; use another output folder"
            ) from None
    return open_plan(state)


def hash_of(files: Sequence[PlanFile], carried: pa.Schema) -> str:
    """The hash of a plan of these files and carried columns, in hexadecimal."""
    digest = hashlib.sha256(carried.serialize().to_pybytes())
    for file in files:
        digest.update(bytes.fromhex(file.sha256))
    return digest.hexdigest()


def _write_files(
    items: Iterable[pa.Table], state: Storage, schema: pa.Schema, fingerprint: str
) -> Iterator[PlanFile]:
    item_id = 0
    with tempfile.TemporaryDirectory(prefix="iab-vision-plan-") as folder:
        for number, groups in enumerate(_files_of(_groups_of(items))):
            local = Path(folder) / "plan.parquet"
            n_items, n_rows = _write_file(local, groups, schema, item_id)
            path = f"plan/plan-{fingerprint[:8]}-{number:05d}.parquet"
            with local.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            written = PlanFile(path, n_items, n_rows, local.stat().st_size, sha256)
            state.put_file(path, local)
            yield written
            item_id += n_items


def _groups_of(items: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Re-cut tables of items into row groups."""
    waiting: list[pa.Table] = []
    n_items = n_rows = 0
    for table in items:
        for piece in _cut(table):
            rows = pc.sum(pc.list_value_length(piece["table_rows"])).as_py() or 0
            if waiting and (n_items + piece.num_rows > ITEMS_PER_GROUP or n_rows + rows > ROWS_PER_GROUP):
                yield pa.concat_tables(waiting)
                waiting, n_items, n_rows = [], 0, 0
            waiting.append(piece)
            n_items, n_rows = n_items + piece.num_rows, n_rows + rows
    if waiting:
        yield pa.concat_tables(waiting)


def _cut(table: pa.Table) -> Iterator[pa.Table]:
    """Pieces of at most half a row group, by items and by rows (an item is never cut); none of no items."""
    lengths = pc.list_value_length(table["table_rows"]).to_numpy()
    weights = np.maximum(
        np.cumsum(lengths) // (ROWS_PER_GROUP // 2), np.arange(len(lengths)) // (ITEMS_PER_GROUP // 2)
    )
    cuts = np.flatnonzero(np.diff(weights, prepend=-1))
    for start, stop in pairwise([*cuts.tolist(), len(lengths)]):
        yield table.slice(start, stop - start)


def _files_of(groups: Iterator[pa.Table]) -> Iterator[Iterator[pa.Table]]:
    """The groups of each file in turn, which are made as they are read: one at a time is in memory."""
    ahead = next(groups, None)

    def take_file() -> Iterator[pa.Table]:
        nonlocal ahead
        n_items = 0
        while ahead is not None and (not n_items or n_items + ahead.num_rows <= ITEMS_PER_FILE):
            n_items += ahead.num_rows
            yield ahead
            ahead = next(groups, None)

    while ahead is not None:
        yield take_file()


def _write_file(local: Path, groups: Iterable[pa.Table], schema: pa.Schema, item_id: int) -> tuple[int, int]:
    n_items = n_rows = 0
    with pq.ParquetWriter(
        local, schema, compression="zstd", compression_level=1, use_dictionary=["payload_column", "container"]
    ) as writer:
        for group in groups:
            numbers = pa.array(np.arange(item_id + n_items, item_id + n_items + group.num_rows))
            table = group.add_column(0, schema.field("item_id"), numbers).select(schema.names)
            writer.write_table(table, row_group_size=max(1, group.num_rows))
            n_items += group.num_rows
            n_rows += pc.sum(pc.list_value_length(table["table_rows"])).as_py() or 0
    return n_items, n_rows


def discard_plan(state: Storage) -> None:
    """Remove what was planned under a state folder in which no run began."""
    state.delete(PLAN_JSON)
    state.delete(*[entry.path for entry in state.list("plan")])


def open_plan(state: Storage) -> Plan:
    """The plan that is frozen under a state folder.

    Raises:
        NoPlan: none was finished there.
        InputError: another version of iab-vision wrote it.
    """
    if not state.exists(PLAN_JSON):
        raise NoPlan(f"{state.uri} holds no {PLAN_JSON}: planning there was never finished")
    found = json.loads(state.read(PLAN_JSON))
    version = found.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"{state.uri} holds a plan of format {version}, written by another version of iab-vision; "
            f"this one reads format {FORMAT_VERSION}. Finish that run with the version that began it, or "
            "classify into another output folder"
        )
    return Plan(
        state_uri=state.uri,
        origin=Origin(found["inventory"], found["base"], found["fingerprint"]),
        hash=found["hash"],
        n_items=found["n_items"],
        n_rows=found["n_rows"],
        carried=pa.ipc.read_schema(pa.BufferReader(base64.b64decode(found["carried"]))),
        files=tuple(PlanFile(**file) for file in found["files"]),
        containers=tuple(FoundFile(**file) for file in found["containers"]),
    )
