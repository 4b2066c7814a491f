"""Predictions tables of any labels, written without a model."""

import hashlib
from collections.abc import Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import schema
from pipelines.taxonomy import taxonomy

TREE = taxonomy.load("3.1")
NIGHTS_SCHEMA = schema.predictions_schema(pa.schema([("publisher", pa.string())])).append(
    pa.field("carried_from", pa.date32())
)


def row(at: int, top_id: str | None, **changed: Any) -> dict[str, Any]:
    """One row; without a label where `top_id` is None."""
    found = {
        "image_id": str(at), "uri": f"https://cdn{at % 3}.example/{at}.jpg", "publisher": f"p{at % 2}",
        "status": "ok" if top_id else "not_found", "cattax": 9, "model_id": "m1", "taxonomy": "3.1",
        "precision": "fp32", "run_id": "r1",
        "classified_at": datetime(2026, 11, 21, tzinfo=UTC),
    }  # fmt: skip
    if top_id:
        found |= {
            "sha256": hashlib.sha256(str(at).encode()).hexdigest(), "width_px": 6, "height_px": 4,
            "format": "jpeg", "top_id": top_id, "top_score": 0.8, "tier1_id": TREE.tier1(top_id),
            "tier1_score": 0.9, "cat": [top_id], "labels": [{"id": top_id, "score": 0.8}],
        }  # fmt: skip
    return found | changed


def write_rows(folder: Path, rows: Sequence[dict[str, Any]], name: str = "part-00000.parquet") -> str:
    """Write one file of a table; returns its name."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=NIGHTS_SCHEMA), folder / name)
    return name


def carried(at: int, top_id: str) -> dict[str, Any]:
    """A row whose result is that of the night before."""
    return row(at, top_id, carried_from=date(2026, 11, 20))
