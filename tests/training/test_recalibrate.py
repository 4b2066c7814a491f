"""A finished run gets other thresholds from the logits that it kept."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs.cli import main
from pipelines.evaluation.evaluation import Scored
from pipelines.evaluation.metrics import probabilities
from pipelines.evaluation.score import EvalResult
from pipelines.specs import ImageSpec, ModelSpec
from pipelines.training import model_files, recalibrate, runs

SPEC = ModelSpec(("483", "1", "425"), "3.1", ImageSpec())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What training leaves, as far as calibration reads it; the logits are three times too sure."""
    folder = tmp_path / "run"
    (folder / "best").mkdir(parents=True)
    recalibrate.write_scores(str(folder), {"validation": drawn(400, seed=0), "test": drawn(4000, seed=1)})
    (folder / "best" / model_files.SIDECAR).write_text(model_files.sidecar_json(SPEC))
    content = {
        "recipe": {
            "model": "scratch:tiny",
            "epochs": 1,
            "batch_size": 8,
            "seed": 0,
            "metric_for_best_model": "accuracy",
        },
        "dataset": {"uri": "photos"},
        "taxonomy": "3.1",
        "classes": list(SPEC.class_ids),
        "multi_label": False,
        "image_spec": {"height": 224, "width": 224},
        "best": {"epoch": 1},
        "temperature": 1.0,
        "data": {
            "images": {"train": 10},
            "unreadable": [],
            "duplicates_removed": {},
            "class_counts": {"1": 10},
        },
        "test": {"accuracy": 0.5},
        "seconds": 1,
    }
    (folder / runs.MARKER).write_text(json.dumps(content))
    return folder


def drawn(n: int, seed: int) -> EvalResult:
    rng = np.random.default_rng(seed)
    logits_nc = rng.normal(scale=2, size=(n, 3)).astype(np.float32)
    targets = (logits_nc + rng.gumbel(size=logits_nc.shape)).argmax(axis=1)
    scored = Scored(SPEC.class_ids, 3 * logits_nc, probabilities(3 * logits_nc), targets)
    images = pa.table({"uri": [f"s3://user:secret@bucket/{seed}-{row}.jpg" for row in range(n)]})
    return EvalResult(scored, images, [])


def test_thresholds_follow_the_precision_asked_for_without_training(run, caplog):
    found = {}
    for target in ("0.9", "0.7"):
        assert main(["calibrate", str(run), "--target-precision", target]) == 0
        spec = json.loads((run / "best" / model_files.SIDECAR).read_text())
        content = json.loads((run / runs.MARKER).read_text())
        assert spec["temperature"] == content["temperature"] == pytest.approx(3, rel=0.2)
        assert spec["thresholds"] == content["thresholds"]
        assert content["published"]["test"]["precision"] >= float(target) - 0.02
        found[target] = spec["thresholds"]["483"]
    assert found["0.7"] < found["0.9"]
    assert content["published"]["test"]["coverage"] > 0.5
    assert (run / "calibration" / "report.html").exists()
    assert "temperature 3" in (run / "best" / "README.md").read_text()


def test_category_out_of_reach_is_named_with_what_it_needs(run, caplog):
    assert main(["calibrate", str(run), "--target-precision", "0.999"]) == 0
    assert "never published without" in caplog.text and "Sports" in caplog.text
    assert json.loads((run / runs.MARKER).read_text())["never_published"].keys() >= {"483", "1"}


def test_category_without_validation_images_is_told_so(run, caplog):
    """A better model would not help it: nothing says how good this one is."""
    result = drawn(400, seed=0)
    others = np.flatnonzero(result.scored.targets != 1)
    scored = Scored(
        SPEC.class_ids,
        result.scored.logits_nc[others],
        result.scored.probabilities_nc[others],
        result.scored.targets[others],
    )
    recalibrate.write_scores(str(run), {"validation": EvalResult(scored, result.images.take(others), [])})
    assert main(["calibrate", str(run), "--target-precision", "0.999"]) == 0
    lines = [line for line in caplog.messages if line.startswith("never published without")]
    (none,) = (line for line in lines if "of which there are none" in line)
    assert none.endswith("none: Automotive") and not any(
        "Automotive" in line for line in lines if line != none
    )


def test_report_says_where_thresholds_were_measured_on_their_own_images(run):
    recalibrate.write_scores(str(run), {"validation": drawn(400, seed=0)})
    assert main(["calibrate", str(run)]) == 0
    about = json.loads((run / "calibration" / "evaluation.json").read_text())["about"]
    assert about["thresholds"] == "fitted on these images: their precision is biased upward"


def test_folder_without_a_finished_run_or_its_logits_is_wrong_input(run, tmp_path, capsys):
    assert main(["calibrate", str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    (run / recalibrate.SCORES).unlink()
    assert main(["calibrate", str(run)]) == 2
    assert "holds no scores.parquet" in capsys.readouterr().err


def test_kept_addresses_have_no_credentials(run):
    assert b"secret" not in (run / recalibrate.SCORES).read_bytes()
