"""A plan of a few items with every awkwardness, and the results that a run would have for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines import schema
from pipelines.inventory.plan import Origin, Plan, item_schema, write_plan
from pipelines.ledger.entries import Part
from pipelines.ledger.layout import PLAIN, TableLayout
from pipelines.ledger.ledger import Ledger
from pipelines.ledger.parts import PartContext, drop_repeats, write_part
from pipelines.ledger.publish import find_failed_items, publish
from pipelines.storage.storage import Storage, open_storage
from pipelines.storage.uris import join
from tests.builders.hooked_storage import HookedStorage

CARRIED = pa.schema(
    [
        pa.field("publisher_id", pa.int32()),
        pa.field("item_id", pa.list_(pa.string())),
        pa.field(".container", pa.string()),
    ]
)
"""A carried column may be called what we call our own inside, or like a path, and be of any type."""
IDENTITY = {"model_id": "m1", "top_k": 2}


@dataclass(frozen=True)
class SmallRun:
    """An output folder with its plan; every third item answers for two rows."""

    uri: str
    plan: Plan

    @property
    def state(self) -> Storage:
        return open_storage(join(self.uri, "state"))

    @property
    def table(self) -> Storage:
        return open_storage(join(self.uri, "table"))

    @property
    def identity(self) -> dict[str, object]:
        return {**IDENTITY, "plan": self.plan.hash}

    def ledger(self, state: Storage | None = None) -> Ledger:
        return Ledger.open(state or self.state, self.identity, n_items=self.plan.n_items)

    def context(self, *, generation: int = 1, final: bool = True) -> PartContext:
        return PartContext(self.state.uri, generation, "r1", "m1", "fp32", "iab-content-3.1", 9, final)

    def write(
        self,
        item_ids: Sequence[int],
        status: Callable[[int], str] = lambda item_id: "ok",
        *,
        generation: int = 1,
        state: Storage | None = None,
    ) -> Part:
        scores = drop_repeats(scored(item_ids, status))
        written = write_part(scores, self.plan, state or self.state, self.context(generation=generation))
        assert written.part is not None
        return written.part

    def publish(self, ledger: Ledger, rows_per_file: int = 8, layout: TableLayout = PLAIN) -> None:
        publish(ledger, self.plan, self.state, self.table, rows_per_file=rows_per_file, layout=layout)


def small_run(uri: str | Path, n_items: int = 20, *, host: str = "host") -> SmallRun:
    """Freeze a plan of `n_items` under a fresh output folder."""
    rows = [[row(item, copy) for copy in range(2 if item % 3 == 0 else 1)] for item in range(n_items)]
    fields = item_schema(CARRIED)
    columns = {
        "uri": [f"https://{host}{item % 4}.example/{item}.jpg" for item in range(n_items)],
        "table_rows": rows,
        **dict.fromkeys(["container", "offset", "length", "payload_column", "validator"], [None] * n_items),
    }
    items = pa.table(columns, schema=pa.schema([field for field in fields if field.name != "item_id"]))
    state = open_storage(join(str(uri), "state"))
    tables = [items] if n_items else []
    return SmallRun(
        str(uri), write_plan(tables, state, carried=CARRIED, origin=Origin("small", str(uri), "f" * 16))
    )


def row(item: int, copy: int) -> dict[str, object]:
    return {
        "image_id": f"image-{item}-{copy}",
        "publisher_id": item * 10,
        "item_id": [str(item)] * copy,
        ".container": f"/etc/{item}",
    }


def scored(item_ids: Sequence[int], status: Callable[[int], str] = lambda item_id: "ok") -> pa.Table:
    """Results of these items: labelled where the status is ok."""
    return pa.Table.from_pylist(
        [result(item_id, status(item_id)) for item_id in item_ids], schema=schema.SCORED
    )


def result(item_id: int, status: str) -> dict[str, object]:
    if status != "ok":
        return {"item_id": item_id, "status": status, "error": f"{status}, says the test"}
    labels = [{"id": "v9i3On", "score": 0.75}, {"id": str(item_id % 5), "score": 0.25}]
    return {
        "item_id": item_id, "status": status, "sha256": f"{item_id:064x}", "width_px": 3, "height_px": 4,
        "format": "jpeg", "top_id": f"{item_id % 5}", "top_score": 0.75, "labels": labels,
        "tier1_id": "1", "tier1_score": 0.9, "cat": ["1"] if item_id % 2 else [],
    }  # fmt: skip


def paused_in_the_put(run: SmallRun) -> None:
    """Publish a failed run; while its file is on its way another driver publishes it, and a rerun."""
    ledger = run.ledger()
    ledger.announce()
    ledger.record([run.write(range(run.plan.n_items), lambda item_id: "timeout")])

    def overtaken(operation: str, args: tuple[Any, ...], proceed: Callable[[], Any]) -> Any:
        if operation == "put_file_over":
            successor = run.ledger()
            successor.announce()
            run.publish(successor)
            successor.start_generation(find_failed_items(successor, run.plan, run.table))
            successor.record([run.write(range(run.plan.n_items), generation=2)])
            run.publish(successor)
        return proceed()

    late: Any = HookedStorage(run.table, overtaken)
    publish(ledger, run.plan, run.state, late, rows_per_file=8)
