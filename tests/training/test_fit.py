"""What a run writes when training is over; training itself is replaced by a model with random weights."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors.torch import load
from transformers import AutoConfig

from pipelines.datasets import dataset, splits
from pipelines.datasets.settings import DataSettings, ImageCache, Splits
from pipelines.evaluation.evaluation import Scored
from pipelines.evaluation.metrics import probabilities
from pipelines.evaluation.score import EvalResult
from pipelines.training import decoded, evaluate, fit, model_files, recalibrate
from pipelines.training import model as vit
from pipelines.training.decoded import DecodedData
from pipelines.training.recipe import ClassBalance
from pipelines.training.resources import Resources
from tests.builders.training import RECIPE, image_folder

HOW = ImageCache()


@pytest.fixture
def job(tmp_path: Path, monkeypatch) -> fit.TrainingJob:
    """A run whose class 483 is rare and drawn as often as the others."""
    folder = image_folder(tmp_path / "images", per_class=24)
    for n in range(6, 24):
        (folder / "483" / f"{n}.png").unlink()
    data = dataset.load(DataSettings(str(folder), splits=Splits(validation=0.3, test=0.2)))
    recipe = replace(RECIPE, class_balance=ClassBalance(sampling="oversample"))
    job = fit.plan_job(data, recipe, str(tmp_path / "run"), Resources(num_workers=1))
    rows = {name: data.indices(name) for name in (splits.TRAIN, splits.VALIDATION, splits.TEST)}
    prepared = DecodedData(data, job.spec, job.spec, {}, rows, "memory", HOW, [], {})
    model = vit.build(job.recipe, vit.Classes(data.classes, data.multi_label))
    model_files.write_model(model, folder := tmp_path / "model", job.model_spec)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(decoded, "prepare", lambda *arguments, **settings: prepared)
    monkeypatch.setattr(fit, "train", lambda *arguments: None)
    monkeypatch.setattr(fit, "best_model", lambda result: (files, {"epoch": 1, "score": 0.5}))
    monkeypatch.setattr(evaluate, "score_splits", score_splits)
    monkeypatch.setattr(evaluate, "write_run_report", lambda *arguments, **settings: None)
    return job


def score_splits(corpus, model_spec, files, resources) -> dict[str, EvalResult]:
    found, targets = {}, corpus.data.targets()
    for name in evaluate.MEASURED:
        rows = corpus.rows[name]
        logits_nc = np.random.default_rng(0).normal(size=(len(rows), len(model_spec.class_ids)))
        scored = Scored(model_spec.class_ids, logits_nc, probabilities(logits_nc), targets[rows])
        images: pa.Table = corpus.data.take(rows)
        found[name] = EvalResult(scored, images, [])
    return found


def test_run_takes_back_what_sampling_did_and_keeps_its_logits(job, tmp_path):
    fit.fit(job, HOW)
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    shift = content["prior_shift"]
    assert shift["483"] > 0.5 > shift["1"]
    before = load((tmp_path / "model" / "model.safetensors").read_bytes())["classifier.bias"]
    after = load((tmp_path / "run" / "best" / "model.safetensors").read_bytes())["classifier.bias"]
    expected = [shift[one] for one in job.data.classes]
    assert (before - after).tolist() == pytest.approx(expected, abs=1e-6)
    spec = replace(job.model_spec, temperature=content["temperature"])
    kept = recalibrate.read_scores(job.output, spec)
    assert {name: len(one.targets) for name, one in kept.items()} == {
        name: len(job.data.indices(name)) for name in evaluate.MEASURED
    }


def test_best_model_names_its_classes_by_their_paths(job, tmp_path):
    fit.fit(job, HOW)
    best = tmp_path / "run" / "best"
    config = AutoConfig.from_pretrained(best)
    expected = {one: job.data.taxonomy.path(one) for one in job.data.classes}
    assert [config.label_paths[one] for one in config.id2label.values()] == list(expected.values())
    card = (best / "README.md").read_text()
    assert all(f"| {path} | `{one}` |" in card for one, path in expected.items())
    assert model_files.read_model_spec(best, "here").class_ids == job.data.classes


def test_run_names_the_categories_that_are_never_published(job, caplog):
    run = fit.fit(job, HOW)
    never = {one for one, threshold in run.content["thresholds"].items() if threshold > 1}
    assert run.content["never_published"].keys() == never
    assert "never published without" in caplog.text
    assert never and all(job.data.taxonomy.path(one) in caplog.text for one in never)
