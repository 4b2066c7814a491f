"""A finished run gets another temperature and other thresholds, from the logits that it kept."""

import json
from dataclasses import asdict

from pipelines.evaluation.calibration import ThresholdRule
from pipelines.evaluation.report import ReportExtras, write_report
from pipelines.messages import InputError, redact
from pipelines.specs import ModelSpec
from pipelines.storage import storage, uris
from pipelines.taxonomy import taxonomy
from pipelines.training import evaluate, model_files, runs, scores
from pipelines.training.evaluate import Calibrated
from pipelines.training.hub import model_card

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
    found = evaluate.calibrate(scores.read(run_uri, spec), spec, tree, rule)
    about = {
        "model": content["recipe"]["model"],
        "dataset": content["dataset"]["uri"],
        "taxonomy": tree.name,
    }
    measured = evaluate.evaluate_splits(found.scored, found.spec, tree, about=about)
    write_report(list(measured.values())[-1], uris.join(run_uri, REPORT), ReportExtras())
    content |= {
        "temperature": found.spec.temperature,
        "thresholds": dict(found.spec.thresholds),
        "never_published": found.images_needed,
        "published": {name: dict(one.published) for name, one in measured.items()},
        "threshold_rule": asdict(rule),
        **{name: dict(one.overall) for name, one in measured.items()},
    }
    paths = {one: tree.path(one) for one in spec.class_ids}
    folder.put(sidecar, model_files.sidecar_json(found.spec).encode())
    folder.put(f"{runs.BEST}/README.md", model_card(content, paths).encode())
    folder.put(runs.MARKER, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    evaluate.log_unpublished(found, tree, rule)
    return found
