"""A published night of any size whose results no model gave, written by the run's own functions."""

from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa

from jobs.config import NightlyConfig
from jobs.run_nightly import open_run
from pipelines import schema
from pipelines.classify import run as runs
from pipelines.ledger.parts import Committer, join_plan_rows, store_part
from pipelines.nights import night as nights
from pipelines.nights.folders import DateFolders

ITEMS_PER_PART = 100_000


def publish_made_up_night(inventory: Path, bundle: Path, table: Path, day: date) -> None:
    """Publish a date over the inventory, as a run would leave it."""
    config = NightlyConfig(inventory=str(inventory), bundle=str(bundle), table=str(table), date=day)
    night = open_run(config, DateFolders(str(table), day), 1)
    run = night.run
    runs.announce(run)
    nights.carry_over(night)
    context = runs.part_context(run, final=True)
    committer = Committer(run.ledger, run.state)
    for start in range(0, run.plan.n_items, ITEMS_PER_PART):
        scored = make_up_results(start, min(run.plan.n_items, start + ITEMS_PER_PART))
        committer.add(store_part(join_plan_rows(scored, run.plan, context), run.state, 1))
    committer.flush()
    nights.gather_night(night)
    nights.publish_night(night)
    nights.finish_night(night, 0, "not judged")


def make_up_results(start: int, stop: int) -> pa.Table:
    """Labels of the items `start` to `stop`, as the model's step would leave them."""
    random = np.random.default_rng(start)
    n = stop - start
    ids = pa.array(["483", "1", "v9i3On", "425", "552"])
    ranks = pa.array(random.integers(0, 5, (n, 5)).reshape(-1))
    scores = pa.array(random.random(5 * n), pa.float32())
    labels = pa.StructArray.from_arrays([ids.take(ranks), scores], fields=list(schema.LABELS_TYPE.value_type))
    top = ids.take(ranks.take(pa.array(np.arange(n) * 5)))
    score = scores.take(pa.array(np.arange(n) * 5))
    columns = {
        "item_id": pa.array(np.arange(start, stop)),
        "status": pa.repeat("ok", n),
        "error": pa.nulls(n, pa.string()),
        "sha256": pa.array([random.bytes(32).hex() for _ in range(n)]),
        "width_px": pa.repeat(pa.scalar(500, pa.int32()), n),
        "height_px": pa.repeat(pa.scalar(375, pa.int32()), n),
        "format": pa.repeat("jpeg", n),
        "etag": pa.nulls(n, pa.string()),
        "last_modified": pa.nulls(n, pa.string()),
        "top_id": top,
        "top_score": score,
        "labels": pa.ListArray.from_arrays(pa.array(np.arange(0, 5 * n + 1, 5), pa.int32()), labels),
        "tier1_id": top,
        "tier1_score": score,
        "cat": pa.ListArray.from_arrays(pa.array(np.arange(n + 1), pa.int32()), top),
        "classified_at": pa.repeat(pa.scalar(datetime.now(UTC), pa.timestamp("us", "UTC")), n),
    }
    return pa.table(columns)
