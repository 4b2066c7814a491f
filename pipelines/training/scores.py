"""The logits of a run's validation and test images, kept so that they can be calibrated again."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.evaluation.evaluation import Scored
from pipelines.evaluation.metrics import probabilities
from pipelines.evaluation.score import EvalResult
from pipelines.messages import InputError, redact
from pipelines.specs import ModelSpec
from pipelines.storage import storage

FILE = "scores.parquet"
"""One row per image: split, uri, true class indices, logits before any temperature."""


def write(run_uri: str, results: Mapping[str, EvalResult]) -> None:
    """Write the file into a run's folder."""
    tables = [
        pa.table(
            {
                "split": [split] * result.images.num_rows,
                "uri": [redact(uri) for uri in result.images["uri"].to_pylist()],
                "classes": pa.array(
                    [np.flatnonzero(row).tolist() for row in result.scored.targets_nc], pa.list_(pa.int32())
                ),
                "logits": pa.array(list(result.scored.logits_nc), pa.list_(pa.float32())),
            }
        )
        for split, result in results.items()
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables(tables), sink, compression="zstd")
    storage.open_storage(run_uri).put(FILE, sink.getvalue().to_pybytes())


def read(run_uri: str, spec: ModelSpec) -> dict[str, Scored]:
    """Split -> what the model said of its images, at a temperature of 1.

    Raises:
        InputError: the run is of a version that did not keep them, or is not finished.
    """
    folder = storage.open_storage(run_uri)
    if not folder.exists(FILE):
        raise InputError(
            f"{redact(run_uri)} holds no {FILE}; only a finished run of `train` has it. Runs of earlier "
            "versions must be trained again"
        )
    table = pq.read_table(pa.BufferReader(folder.read(FILE)))
    found = {}
    for split in table["split"].unique().to_pylist():
        rows = table.filter(pa.compute.equal(table["split"], split))
        logits_nc = np.array(rows["logits"].to_pylist(), np.float32)
        targets_nc = np.zeros(logits_nc.shape, np.uint8)
        for row, classes in enumerate(rows["classes"].to_pylist()):
            targets_nc[row, classes] = 1
        targets = targets_nc if spec.multi_label else targets_nc.argmax(axis=1)
        scores_nc = probabilities(logits_nc, multi_label=spec.multi_label)
        found[split] = Scored(spec.class_ids, logits_nc, scores_nc, targets)
    return found
