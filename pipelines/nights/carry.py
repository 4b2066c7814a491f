"""Decided items -> parts of the run with the rows of an earlier night, a hundred thousand at a time.

The rows are the caller's own of tonight; their results are those that the earlier night published. The
ledger lists these parts like any other: what it still misses is what has to be fetched.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date

import duckdb
import numpy as np
import pyarrow as pa

from pipelines import schema
from pipelines.inventory.plan import Plan
from pipelines.ledger.parts import Committer, PartContext, join_plan_rows, split_by_rows, store_part
from pipelines.ledger.publish import row_groups
from pipelines.nights.database import create_view
from pipelines.nights.decide import CARRIED, CARRIED_FAILURE
from pipelines.nights.folders import Night
from pipelines.schema import CARRIED_FROM
from pipelines.storage.storage import Storage

ITEMS_PER_PART = 100_000

RESULTS = pa.schema(
    [
        *schema.OUTCOME,
        *schema.LABELLED,
        schema.PREDICTIONS_TAIL.field("classified_at"),
        CARRIED_FROM,
    ]
)
"""What is taken from an earlier night."""
_CARRIED = pa.schema([pa.field("item_id", pa.int64()), *RESULTS, *schema.RESPONSE])

_ROWS = f"""
SELECT item_id, {", ".join(f"earlier.{name}" for name in RESULTS.names if name != CARRIED_FROM.name)},
       nullif(coalesce(earlier.carried_from, $night), $tonight) AS carried_from,
       responses.etag, responses.last_modified
FROM (SELECT md5_number(uri) AS key, {", ".join(RESULTS.names)} FROM previous) AS earlier
JOIN (SELECT item_id, key FROM decided WHERE decision IN ({CARRIED}, {CARRIED_FAILURE})) USING (key)
LEFT JOIN (
    SELECT md5_number(uri) AS key, etag, last_modified FROM seen
    WHERE etag IS NOT NULL OR last_modified IS NOT NULL
) AS responses USING (key)
ORDER BY item_id
"""


@dataclass(frozen=True)
class Target:
    """The run that carried rows go to."""

    plan: Plan
    state: Storage
    context: PartContext
    committer: Committer
    tonight: date


def carry_rows(database: duckdb.DuckDBPyConnection, previous: Night, target: Target) -> None:
    """Write and record every carried row; `decide` has left its tables in the database."""
    if not previous.n_rows:
        return
    create_view(database, "previous", previous.table, previous.files)
    nights = {"night": previous.date, "tonight": target.tonight}
    results = database.sql(_ROWS, params=nights).to_arrow_reader(ITEMS_PER_PART)
    plan, generation = target.plan, target.context.generation
    for items in row_groups(_drop_repeats(results), _CARRIED, ITEMS_PER_PART):
        for piece in split_by_rows(items, plan) if plan.n_rows > plan.n_items else [items]:
            rows = join_plan_rows(piece, plan, target.context)
            target.committer.add(store_part(rows, target.state, generation))
    target.committer.flush()


def _drop_repeats(results: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """One row per item, in the ascending order that they come in: an earlier URI may have had many rows."""
    last = -1
    for batch in results:
        item_ids = batch.column("item_id").to_numpy()
        first = np.flatnonzero(np.diff(item_ids, prepend=last))
        last = item_ids[-1] if len(item_ids) else last
        yield pa.Table.from_batches([batch]).take(pa.array(first))
