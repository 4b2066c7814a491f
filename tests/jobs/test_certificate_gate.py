"""No job runs a model without proof unless it was asked to, and then everything that it leaves says so."""

import json
from pathlib import Path

import pytest

from jobs import classify_images
from jobs.cli import main
from jobs.config import ClassifyConfig
from pipelines.bundle import bundle
from pipelines.bundle.bundle import open_bundle
from pipelines.classify import run as runs
from tests.builders.models import PASSED, dataset, small_bundle


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A bundle that nothing certifies."""
    small_bundle(tmp_path / "bare", certificates={})
    return tmp_path / "bare"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return dataset(tmp_path / "pictures", 10)


def jobs(folder: Path, pictures: Path, output: Path) -> dict[str, list[str]]:
    given = ["--bundle", str(folder), "--output", str(output)]
    return {
        "classify": ["classify", "--inventory", str(pictures), *given],
        "evaluate": ["evaluate", "--dataset", str(pictures / "labels.csv"), "--split", "all", *given],
        "predict": ["predict", str(pictures / "1.jpg"), "--bundle", str(folder), "--json"],
    }


@pytest.mark.parametrize("job", ["classify", "evaluate", "predict"])
def test_uncertified_bundle_is_refused_with_the_command_that_certifies(bare, pictures, tmp_path, capsys, job):
    assert main(jobs(bare, pictures, tmp_path / "out")[job]) == 3
    assert "iab-vision certify" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("job", ["classify", "evaluate", "predict"])
def test_precision_that_the_bundle_lacks_is_refused_even_without_proof(bare, pictures, tmp_path, capsys, job):
    """Not by the actors, minutes later."""
    command = jobs(bare, pictures, tmp_path / "out")[job]
    assert main([*command, "--precision", "int8", "--allow-uncertified"]) == 3
    assert "holds no int8 model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_prediction_without_proof_is_loud_and_every_row_says_so(bare, pictures, tmp_path, capsys, caplog):
    command = jobs(bare, pictures, tmp_path)["predict"]
    assert main([*command, "--allow-uncertified"]) == 0
    assert json.loads(capsys.readouterr().out)["certified"] is False
    assert "running uncertified" in caplog.text
    bundle.add_certificate(str(bare), open_bundle(str(bare)).manifest, "cpu", "fp32", PASSED)
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["certified"] is True


def test_evaluation_without_proof_says_so(bare, pictures, tmp_path, caplog):
    command = jobs(bare, pictures, tmp_path / "out")["evaluate"]
    assert main([*command, "--allow-uncertified"]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["about"]["certificate"] == "NONE (--allow-uncertified)"
    assert "running uncertified" in caplog.text


def test_run_whose_first_half_was_without_proof_is_never_reported_as_certified(bare, pictures, tmp_path):
    """Even when the bundle was certified before the run went on."""
    output = str(tmp_path / "out")
    settings = {"inventory": str(pictures), "bundle": str(bare), "output": output}
    first = classify_images.prepare(ClassifyConfig(**settings, allow_uncertified=True))
    runs.announce(first)
    bundle.add_certificate(str(bare), first.bundle.manifest, "cpu", "fp32", PASSED)
    second = classify_images.prepare(ClassifyConfig(**settings))
    runs.announce(second)
    assert second.certified
    runs.write_report(second)
    report = json.loads((tmp_path / "out" / "state" / "report.json").read_text())
    assert (report["certified"], report["providers"]) == (False, ["cpu"])
    assert json.loads((tmp_path / "out" / "state" / "run.json").read_text())["certified"] is False
