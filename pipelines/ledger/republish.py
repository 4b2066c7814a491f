"""A rerun of failed rows: the published files again, with the rows of the rerun items put in place.

The table's files do not say which plan item a row answers for; their ledger entries list the items in
file order, and the plan says how many rows each has.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.inventory.plan import Plan
from pipelines.ledger.entries import Part, TableFile
from pipelines.ledger.item_set import Range, ids_of
from pipelines.ledger.layout import TableLayout
from pipelines.ledger.ledger import Ledger
from pipelines.ledger.parts import read_part
from pipelines.schema import ITEM_ID
from pipelines.storage.storage import Storage

ITEMS_AT_ONCE = 65_536


def list_row_items(items: Sequence[Range], plan: Plan) -> np.ndarray:
    """The item that each table row answers for, int64 [rows], for items in file order."""
    item_ids = ids_of(items)
    rows_each = [pc.list_value_length(batch["table_rows"]).to_numpy() for batch in item_batches(items, plan)]
    return np.repeat(item_ids, np.concatenate([np.empty(0, np.int64), *rows_each]))


def item_batches(items: Sequence[Range], plan: Plan) -> Iterator[pa.Table]:
    """The plan's `uri` and `table_rows` of these items in their order, a bounded number at a time."""
    waiting: list[Range] = []
    room = ITEMS_AT_ONCE
    for start, stop in items:
        for block in range(start, stop, ITEMS_AT_ONCE):
            waiting.append((block, min(stop, block + ITEMS_AT_ONCE)))
            room -= waiting[-1][1] - block
            if room <= 0:
                yield plan.items(waiting, ["uri", "table_rows"])
                waiting, room = [], ITEMS_AT_ONCE
    if waiting:
        yield plan.items(waiting, ["uri", "table_rows"])


def replace_rows(
    file: TableFile, ledger: Ledger, plan: Plan, state: Storage, table: Storage, layout: TableLayout
) -> Iterator[pa.Table]:
    """The published file row group by row group, with the rerun items' rows replaced in place."""
    sequence = list_row_items(file.items, plan)
    changed = np.isin(sequence, ids_of(ledger.state.reopened))
    fields = layout.schema(plan.carried)
    fresh = layout.complete(_read_fresh_rows(ledger.state.parts, sequence[changed], state))
    fresh = _sort_in_file_order(fresh, sequence[changed]).select(fields.names).cast(fields)
    source = pq.ParquetFile(table.open_input(file.name))
    start = used = 0
    for number in range(source.num_row_groups):
        group = source.read_row_group(number).select(fields.names).cast(fields)
        here = changed[start : start + group.num_rows]
        new = int(here.sum())
        indices = np.arange(group.num_rows)
        indices[here] = group.num_rows + np.arange(new)
        yield pa.concat_tables([group, fresh.slice(used, new)]).take(indices)
        start, used = start + group.num_rows, used + new


def _read_fresh_rows(parts: Sequence[Part], item_ids: np.ndarray, state: Storage) -> pa.Table:
    """The rows of these items out of the parts that hold any of them."""
    wanted = pa.array(np.unique(item_ids))
    holding = [part for part in parts if np.isin(ids_of(part.items), item_ids).any()]
    tables = [read_part(part, state) for part in holding]
    return pa.concat_tables([rows.filter(pc.is_in(rows[ITEM_ID], wanted)) for rows in tables])


def _sort_in_file_order(fresh: pa.Table, item_ids: np.ndarray) -> pa.Table:
    """Rows put in the order in which their items follow each other in the file, without the item id."""
    distinct, first = np.unique(item_ids, return_index=True)
    rank = first[np.searchsorted(distinct, fresh[ITEM_ID].to_numpy())]
    return fresh.take(np.argsort(rank, kind="stable"))
