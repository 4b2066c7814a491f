"""A finished run gets another temperature and other thresholds, from the logits that it kept.

`fit` keeps them in `scores.parquet`: those of the validation and test images.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.evaluation.calibration import ThresholdRule
from pipelines.evaluation.evaluation import Evaluation, Scored
from pipelines.evaluation.metrics import probabilities
from pipelines.evaluation.report import ReportExtras, write_report
from pipelines.evaluation.score import EvalResult
from pipelines.messages import InputError, redact
from pipelines.specs import ModelSpec
from pipelines.storage import storage, uris
from pipelines.taxonomy import taxonomy
from pipelines.training import evaluate, model_files, runs
from pipelines.training.evaluate import Calibrated
from pipelines.training.hub import model_card

SCORES = "scores.parquet"
"""One row per image: split, uri, true class indices, logits before any temperature."""
REPORT = "calibration"
"""Folder of the page over the new figures; `report/` stays as training left it."""


def recalibrate(run_uri: str, rule: ThresholdRule) -> Calibrated:
    """Fit again on the validation images and write best/iab_vision.json, its card and, last, run.json.

    Raises:
        InputError: the folder holds no finished run, or one without its logits.
    """
    folder = storage.open_storage(run_uri)
    sidecar = f"{runs.BEST}/{model_files.SIDECAR}"
    if not folder.exists(runs.MARKER) or not folder.exists(sidecar):
        raise InputError(f"{redact(run_uri)} holds no finished run; give the output of `train`")
    content = runs.read_json(folder, runs.MARKER)
    stated = runs.read_json(folder, sidecar)
    stated.pop("labels_are_ids", None)
    spec = ModelSpec(**stated)
    tree = taxonomy.load(spec.taxonomy, labels=spec.class_ids)
    found = evaluate.calibrate(read_scores(run_uri, spec), spec, tree, rule)
    about = {
        "model": content["recipe"]["model"],
        "dataset": content["dataset"]["uri"],
        "taxonomy": tree.name,
    }
    measured = evaluate.evaluate_splits(found.scored, found.spec, tree, about=about)
    write_report(list(measured.values())[-1], uris.join(run_uri, REPORT), ReportExtras())
    content |= {**describe(found, measured), "threshold_rule": asdict(rule)}
    paths = {one: tree.path(one) for one in spec.class_ids}
    folder.put(sidecar, model_files.sidecar_json(found.spec).encode())
    folder.put(f"{runs.BEST}/README.md", model_card(content, paths).encode())
    folder.put(runs.MARKER, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    evaluate.log_unpublished(found, tree, rule)
    return found


def describe(found: Calibrated, measured: Mapping[str, Evaluation]) -> dict[str, Any]:
    """What run.json says of a calibration, and of each split under it."""
    return {
        "temperature": found.spec.temperature,
        "thresholds": dict(found.spec.thresholds),
        "never_published": found.images_needed,
        "published": {name: dict(one.published) for name, one in measured.items()},
        **{name: dict(one.overall) for name, one in measured.items()},
    }


def write_scores(run_uri: str, results: Mapping[str, EvalResult]) -> None:
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
    storage.open_storage(run_uri).put(SCORES, sink.getvalue().to_pybytes())


def read_scores(run_uri: str, spec: ModelSpec) -> dict[str, Scored]:
    """Split -> what the model said of its images, at a temperature of 1.

    Raises:
        InputError: the run is of a version that did not keep them, or is not finished.
    """
    folder = storage.open_storage(run_uri)
    if not folder.exists(SCORES):
        raise InputError(
            f"{redact(run_uri)} holds no {SCORES}; only a finished run of `train` has it. Runs of earlier "
            "versions must be trained again"
        )
    table = pq.read_table(pa.BufferReader(folder.read(SCORES)))
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
