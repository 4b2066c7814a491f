"""Scored items -> part files joined with the caller's rows; parts -> ledger entries.

A part holds whole items, ascending by item id, under a fresh name: writing one twice makes a second file,
which the ledger will not list. It has the item id in front of the table's columns, so that a part that
repeats recorded items can be rewritten without them. `publish` makes the table out of the parts.
"""

import copy
import hashlib
import io
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import metrics, schema
from pipelines.inventory.plan import Plan, open_plan
from pipelines.ledger.entries import Part, read_part_entry
from pipelines.ledger.item_set import ItemSet, Range, Ranges, count, ids_of, ranges_of
from pipelines.ledger.ledger import Ledger
from pipelines.messages import JobFailed
from pipelines.schema import ITEM_ID
from pipelines.status import CARRIED, TRANSIENT, Status
from pipelines.storage.storage import Storage, open_storage

HOST = r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/@?#]*@)?(?P<host>[^/:?#]+)"
"""The host or bucket of a URI, without user and port."""
HOSTS_KEPT = 20
"""Failing hosts that a part names: enough to find the culprit, too few to swell the ledger."""

ROWS_AT_ONCE = 100_000
"""Most rows of a part, about: an image may answer for hundreds, and a writing task has a quarter of a CPU."""
ITEMS_AT_ONCE = 256
"""Items whose rows are counted together."""


@dataclass(frozen=True)
class PartContext:
    """Where parts go, and the values that every row of the run has."""

    state_uri: str
    generation: int
    run_id: str
    model_id: str
    precision: str
    taxonomy: str
    cattax: int
    final: bool
    """Write passing failures too, instead of leaving them for a later pass."""


@dataclass(frozen=True)
class WriteResult:
    """The outcome of one batch: the part, if any row was written, and the items left for a later pass."""

    part: Part | None
    deferred: Sequence[Range]
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Deferred items by status."""
    retry_after_s: float = 0.0
    """The longest wait that a server of a deferred item asked for."""


def write_batch(scored: pa.Table, context: PartContext) -> pa.Table:
    """One batch of `schema.SCORED` -> part files -> for each a row of text columns for the driver."""
    with metrics.timed("write"):
        state, plan = _open_state(context.state_uri)
        pieces = split_by_rows(drop_repeats(scored), plan)
        written = [write_part(piece, plan, state, context) for piece in pieces]
    parts = [json.dumps(asdict(one.part), default=list) if one.part else None for one in written]
    deferred = [json.dumps([one.deferred, one.reasons, one.retry_after_s], default=list) for one in written]
    return pa.table({"part": pa.array(parts, pa.string()), "deferred": deferred})


def split_by_rows(scored: pa.Table, plan: Plan) -> Iterator[pa.Table]:
    """Distinct items in pieces that answer for ROWS_AT_ONCE rows, or for those of ITEMS_AT_ONCE items."""
    start = n_rows = 0
    for at in range(0, scored.num_rows, ITEMS_AT_ONCE):
        item_ids = scored["item_id"].slice(at, ITEMS_AT_ONCE).to_numpy()
        rows = plan.items(ranges_of(item_ids), ["uri", "table_rows"])["table_rows"]
        more = pc.sum(pc.list_value_length(rows)).as_py()
        if at > start and n_rows + more > ROWS_AT_ONCE:
            yield scored.slice(start, at - start)
            start, n_rows = at, 0
        n_rows += more
    yield scored.slice(start)


def read_result(row: Mapping[str, str | None]) -> WriteResult:
    """The inverse of `write_batch`'s row."""
    part = read_part_entry(json.loads(row["part"])) if row["part"] else None
    deferred, reasons, retry_after_s = json.loads(row["deferred"] or "[[], {}, 0]")
    return WriteResult(part, Ranges(deferred), reasons, retry_after_s)


@lru_cache(maxsize=2)
def _open_state(state_uri: str) -> tuple[Storage, Plan]:
    """The state folder and its frozen plan, opened once per worker process."""
    state = open_storage(state_uri)
    return state, open_plan(state)


def write_part(scored: pa.Table, plan: Plan, state: Storage, context: PartContext) -> WriteResult:
    """Join distinct scored items, ascending, with the plan's rows and write them as one Parquet file."""
    result = WriteResult(None, ())
    if not context.final:
        passing = is_passing(scored)
        result = _defer(scored.filter(passing))
        scored = scored.filter(pc.invert(passing))
    if not scored.num_rows:
        return result
    return replace(result, part=store_part(join_plan_rows(scored, plan, context), state, context.generation))


def is_passing(rows: pa.Table) -> pa.ChunkedArray:
    """Which rows failed for a passing reason."""
    return pc.is_in(rows["status"], pa.array([status.value for status in TRANSIENT]))


def _defer(failed: pa.Table) -> WriteResult:
    """The result of items that are left for a later pass."""
    return WriteResult(
        None,
        ranges_of(failed["item_id"].to_numpy()),
        count_values(failed["status"]),
        pc.max(failed["retry_after_s"]).as_py() or 0.0,
    )


def reopen_failed(ledger: Ledger, state: Storage) -> int:
    """Take the items that failed for passing reasons out of the recorded parts; returns their number."""
    holding = [part for part in ledger.state.parts if any(one.value in part.statuses for one in TRANSIENT)]
    return reopen_items(ledger, state, holding, is_passing)


def reopen_known(ledger: Ledger, state: Storage, sha256s: pa.ChunkedArray) -> int:
    """Take the items out whose labels were to be those of these contents; returns their number."""

    def is_lost(rows: pa.Table) -> pa.ChunkedArray:
        known = pc.is_in(rows["status"], pa.array(sorted(CARRIED)))
        return pc.and_(known, pc.is_in(rows["sha256"], sha256s))

    return reopen_items(ledger, state, ledger.state.parts, is_lost)


def reopen_items(
    ledger: Ledger, state: Storage, parts: Sequence[Part], chosen: Callable[[pa.Table], pa.ChunkedArray]
) -> int:
    """Take the items with a chosen row out of recorded parts, in one entry; returns their number."""
    reduced: dict[str, Part | None] = {}
    n_items = 0
    for part in parts:
        rows = read_part(part, state)
        if items := ranges_of(np.unique(rows.filter(chosen(rows))[ITEM_ID].to_numpy())):
            reduced[part.path] = _drop_items(part, state, items, ledger.state.generation)
            n_items += count(items)
    if reduced:
        ledger.reopen(reduced)
    return n_items


def drop_repeats(scored: pa.Table) -> pa.Table:
    """One row per item, ascending by item id: the first where a retried task brought several."""
    _, first = np.unique(scored["item_id"].to_numpy(), return_index=True)
    return scored.cast(schema.SCORED).take(first)


def join_plan_rows(scored: pa.Table, plan: Plan, context: PartContext) -> pa.Table:
    """Rows of `schema.part_schema`: every table row that these items answer for.

    `scored` may say itself when and where its rows were classified: `classified_at`, `carried_from`.
    """
    items = plan.items(ranges_of(scored["item_id"].to_numpy()), ["uri", "validator", "table_rows"])
    rows = items["table_rows"].combine_chunks()
    owners = pc.list_parent_indices(rows)
    results = scored.take(owners)
    fields = schema.part_schema(plan.carried)
    constants = {
        "cattax": context.cattax,
        "model_id": context.model_id,
        "precision": context.precision,
        "run_id": context.run_id,
        "taxonomy": context.taxonomy,
        "classified_at": datetime.now(UTC),
        schema.CARRIED_FROM.name: None,
    }
    columns = {
        name: pa.repeat(pa.scalar(value, fields.field(name).type), len(owners))
        for name, value in constants.items()
    }
    columns |= {name: results[name] for name in scored.column_names if name in fields.names}
    columns |= {f"__{name}": results[name] for name in schema.RESPONSE.names}
    columns |= {ITEM_ID: results["item_id"], "uri": items["uri"].take(owners)}
    columns["__validator"] = items["validator"].take(owners)
    given = rows.flatten()  # its fields by position: pyarrow takes a name like `.a` for a path
    columns |= {field.name: pc.struct_field(given, [index]) for index, field in enumerate(given.type)}
    return pa.table([columns[name] for name in fields.names], schema=fields)


def store_part(table: pa.Table, state: Storage, generation: int) -> Part:
    """Write rows of `schema.part_schema` under a fresh name in one atomic put."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    payload = buffer.getvalue()
    path = f"{parts_folder(generation)}/{uuid.uuid4().hex}.parquet"
    state.put(path, payload)
    return Part(
        path=path,
        sha256=hashlib.sha256(payload).hexdigest(),
        bytes=len(payload),
        items=ranges_of(np.unique(table[ITEM_ID].to_numpy())),
        rows=table.num_rows,
        statuses=_count_statuses(table["status"]),
        hosts=_count_failing_hosts(table),
    )


def parts_folder(generation: int) -> str:
    """One folder per generation, so that clearing one up never touches the next."""
    return f"parts/g{generation:04d}"


def read_part(part: Part, state: Storage) -> pa.Table:
    """The rows of a part. Raises JobFailed if its bytes are not those that were recorded."""
    payload = state.read(part.path)
    digest = hashlib.sha256(payload).hexdigest()
    if digest != part.sha256:
        raise JobFailed(
            f"{state.uri}/{part.path} has sha256 {digest}, the ledger says {part.sha256}; restore it"
        )
    return pq.ParquetFile(pa.BufferReader(payload)).read()


def _drop_items(part: Part, state: Storage, repeats: Sequence[Range], generation: int) -> Part | None:
    """A new part without the repeated items, or None if nothing else is in it."""
    if count(repeats) == count(part.items):
        return None
    table = read_part(part, state)
    outside = pc.invert(pc.is_in(table[ITEM_ID], pa.array(ids_of(repeats))))
    return store_part(table.filter(outside), state, generation)


def count_values(column: pa.ChunkedArray) -> dict[str, int]:
    """How often each value occurs, nulls left out, by value."""
    found = pc.value_counts(column.drop_null())
    pairs = zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True)
    return dict(sorted(pairs))


def _count_statuses(statuses: pa.ChunkedArray) -> dict[str, int]:
    """Rows by status; only results with labels are taken over from an earlier night."""
    carried = pc.is_in(statuses, pa.array(sorted(CARRIED)))
    return count_values(pc.if_else(carried, Status.OK.value, statuses))


def _count_failing_hosts(table: pa.Table) -> dict[str, int]:
    """The hosts (or buckets) that most rows without a label come from."""
    failed = table.filter(pc.invert(pc.is_in(table["status"], pa.array([Status.OK.value, *sorted(CARRIED)]))))
    by_host = count_values(pc.struct_field(pc.extract_regex(failed["uri"], HOST), "host"))
    return dict(sorted(by_host.items(), key=lambda pair: -pair[1])[:HOSTS_KEPT])


class Committer:
    """Owns the driver's pending parts: makes them disjoint and records them every few seconds."""

    def __init__(
        self,
        ledger: Ledger,
        state: Storage,
        *,
        every_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger, self._state = ledger, state
        self.interval_s, self._clock = every_s, clock
        self._written_at = clock()
        self._pending: list[Part] = []
        self._claimed: ItemSet = copy.deepcopy(ledger.done)

    def add(self, part: Part) -> Part | None:
        """Accept a written part without what it repeats; returns what will be recorded, if anything."""
        kept: Part | None = part
        if repeats := self._claimed.present(part.items):
            with self._ledger.detect_rival():
                kept = _drop_items(part, self._state, repeats, self._ledger.state.generation)
        if kept:
            self._pending.append(kept)
            self._claimed.add(kept.items)
        self.tick()
        return kept

    def tick(self) -> None:
        """Write the entry if it is time; with nothing to write, look for a rival."""
        if self._clock() - self._written_at < self.interval_s:
            return
        if self._pending:
            self.flush()
        else:
            self._ledger.check()
        self._written_at = self._clock()
        metrics.put("commit_time_seconds", time.time())

    def flush(self) -> None:
        """Write what is pending now. Safe to call again after it was interrupted anywhere."""
        pending = list(self._pending)
        self._ledger.record(pending)
        del self._pending[: len(pending)]
