"""Scored images -> `evaluation.parquet`, a row per image: for error analysis in DuckDB, pandas or Spark."""

import json
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.evaluation.score import EvalResult
from pipelines.messages import redact
from pipelines.storage import storage

FILE = "evaluation.parquet"

PER_IMAGE = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("split", pa.string()),
        pa.field("group", pa.string()),
        pa.field("labels", pa.list_(pa.string()), nullable=False),
        pa.field("predicted", pa.list_(pa.string()), nullable=False),
        pa.field("correct", pa.bool_(), nullable=False),
        pa.field("likely_labels", pa.list_(pa.string())),
        pa.field("top_id", pa.string(), nullable=False),
        pa.field("top_score", pa.float32(), nullable=False),
        pa.field("loss", pa.float32(), nullable=False),
        pa.field("probabilities", pa.list_(pa.float32()), nullable=False),
    ]
)
"""Ids of the true labels, of those given, and of the likely ones where the true ones are doubtful.

Probabilities are in the order of the file's `class_ids`.
"""


def describe_images(result: EvalResult) -> pa.Table:
    """The columns PER_IMAGE of each image that was scored, then those that it is sliced by.

    `class_ids` are in the schema's metadata.
    """
    scored, images = result.scored, result.images
    ids = np.array(scored.class_ids, dtype=object)
    probabilities_nc = np.ascontiguousarray(scored.probabilities_nc, np.float32)
    n, n_classes = probabilities_nc.shape
    columns = {
        "uri": [redact(uri) for uri in images["uri"].to_pylist()],
        "split": images["split"],
        "group": images["group"],
        "labels": [ids[np.flatnonzero(row)].tolist() for row in scored.targets_nc],
        "predicted": [ids[np.flatnonzero(row)].tolist() for row in scored.given_nc],
        "correct": ~scored.wrong,
        "likely_labels": [
            ids[np.flatnonzero(row)].tolist() if doubtful else None
            for row, doubtful in zip(scored.likely_nc, scored.doubtful, strict=True)
        ],
        "top_id": ids[scored.predicted].tolist(),
        "top_score": probabilities_nc[np.arange(n), scored.predicted],
        "loss": scored.loss.astype(np.float32),
        "probabilities": pa.ListArray.from_arrays(
            pa.array(np.arange(0, n * n_classes + 1, n_classes, dtype=np.int32)), probabilities_nc.ravel()
        ),
    }
    schema = PER_IMAGE.with_metadata({"class_ids": json.dumps(list(scored.class_ids))})
    table = pa.table(columns, schema)
    for name, values in result.slices.items():
        if name not in table.column_names:
            table = table.append_column(name, pa.array(values, pa.string()))
    return table


def write_images(results: Iterable[EvalResult], output_uri: str) -> None:
    """Write `evaluation.parquet` into a folder of any storage."""
    table = pa.concat_tables([describe_images(result) for result in results])
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=10_000)
    storage.open_storage(output_uri).put(FILE, sink.getvalue().to_pybytes())
