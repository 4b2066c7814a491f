"""The search space is checked against the recipe; a search leaves a table, a plot and a usable recipe."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import ray
import yaml

from jobs.config import TrainConfig
from jobs.settings import part_of
from jobs.train_vit import load_labelled
from pipelines.datasets import dataset
from pipelines.datasets.settings import Columns, DataSettings, ImageCache, Splits
from pipelines.messages import InputError
from pipelines.training import fit, runs, tune
from pipelines.training.recipe import Recipe
from pipelines.training.resources import Resources
from tests.builders.training import RECIPE, image_folder

SPACE = {
    "optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]},
    "finetune.freeze": {"choice": ["none", "backbone"]},
}


def test_the_space_that_comes_with_the_project_fits_the_recipe():
    packaged = Path(tune.__file__).parents[2] / "jobs" / "configs" / "tune_space.yaml"
    space = tune.read_space(str(packaged))
    assert set(tune.parse_distributions(space, RECIPE)) >= {
        "optimizer.learning_rate",
        "batch_size",
        "augment.min_crop_scale",
    }


def test_the_space_of_the_documentation_fits_the_recipe():
    text = (Path(tune.__file__).parents[2] / "docs" / "training.md").read_text()
    shown = text.partition("A space maps")[2].split("\n\n")[1]
    space = tune._flatten(yaml.safe_load(shown))
    assert len(tune.parse_distributions(space, RECIPE)) == 2


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"optimizer.learnin_rate": {"uniform": [0, 1]}}, r"\(did you mean optimizer.learning_rate\?\)"),
        ({"optimizer": {"choice": ["adamw"]}}, "optimizer is not a setting"),
        ({"image_size": {"choice": [32, 64]}}, "cannot be searched"),
        ({"batch_size": [32, 64]}, "choice"),
        ({"batch_size": {"any_of": [32]}}, "choice"),
        ({"batch_size": {"randint": [32]}}, "batch_size is"),
        ({"optimizer.learning_rate": {"loguniform": [0, 1]}}, "learning_rate is"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_by_name(space, words):
    with pytest.raises(InputError, match=words):
        tune.parse_distributions(space, RECIPE)


def test_values_reach_their_sections_and_are_checked_there():
    found = tune.apply_values(RECIPE, {"optimizer.layer_decay": 0.7, "batch_size": 8})
    assert found.optimizer.layer_decay == 0.7 and found.batch_size == 8
    assert found.optimizer.weight_decay == RECIPE.optimizer.weight_decay
    with pytest.raises(ValueError, match="layer_decay"):
        tune.apply_values(RECIPE, {"optimizer.layer_decay": 2.0})


def test_the_best_recipe_names_the_data_of_the_search(tmp_path):
    lines = [f"{i},{label},{i // 2}" for i, label in enumerate(["Sports > Tennis", "car", "blurry"] * 20)]
    (tmp_path / "labels.csv").write_text("\n".join(["id,subject,page", *lines]))
    (tmp_path / "map.csv").write_text("from,to\ncar,Automotive\nblurry,\n")
    settings = DataSettings(
        str(tmp_path / "labels.csv"),
        label_map=str(tmp_path / "map.csv"),
        tier=1,
        columns=Columns(label="subject", file="https://me:hunter2@host/{id}.jpg", group="page"),
        splits=Splits(validation=0.3, seed=7, limit=36),
    )
    job = fit.plan_job(dataset.load(settings), RECIPE, str(tmp_path / "search"), Resources())
    how = ImageCache(mode="disk", margin=1.5)
    text = tune.render_recipe(job.recipe, job, how, {"score": 0.5, "epochs": 2}).decode()
    assert "hunter2" not in text and "give those settings on the command line" in text
    (tmp_path / "best.yaml").write_text(text)
    config = TrainConfig.parse(["--config", str(tmp_path / "best.yaml"), "--output", "x"], command="train")
    assert config.cache == how
    again = part_of(config, Recipe).resolved(multi_label=False)
    searched = json.loads(runs.as_json(runs.identity(job.recipe, job.data)))
    assert searched["images"]["train"]
    runs.refuse_mismatch("x", searched, runs.identity(again, load_labelled(config)))


def test_settings_that_go_together_are_set_together():
    values = {"class_balance.sampling": "target", "class_balance.target_per_class": 20, "epochs": 3}
    for order in (values, dict(reversed(values.items()))):
        found = tune.apply_values(RECIPE, order)
        assert (found.class_balance.sampling, found.class_balance.target_per_class, found.epochs) == (
            "target",
            20,
            3,
        )


def test_the_table_lists_the_best_trial_first_and_failed_ones_last():
    def trial(name: str, scores: list[float] | None) -> SimpleNamespace:
        frame = None if scores is None else pd.DataFrame({"score": scores})
        error = "it broke" if scores is None else None
        return SimpleNamespace(metrics={"trial_id": name}, config={}, metrics_dataframe=frame, error=error)

    rows = tune.list_trials([trial("a", [0.1]), trial("b", None), trial("c", [0.2, 0.9, 0.3])], {})
    assert [(row["trial"], row["score"]) for row in rows] == [("c", 0.9), ("a", 0.1), ("b", None)]


def test_as_many_trials_run_at_once_as_the_cluster_has_room_for(monkeypatch, tmp_path):
    data = dataset.load(DataSettings(str(image_folder(tmp_path / "images"))))
    job = fit.plan_job(data, RECIPE, str(tmp_path / "search"), Resources(num_workers=2))
    on_gpus = replace(job, resources=replace(job.resources, use_gpu=True))
    sizes = [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 4.0, "GPU": 2.0}, {}, {"CPU": 4.0}]
    nodes = [{"Alive": number < 3, "Resources": size} for number, size in enumerate(sizes)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 4.0})
    assert [tune._count_parallel_trials(one) for one in (job, on_gpus)] == [3, 2]
    assert tune._share_machines(job, tune.Search(max_concurrent=3)).resources.runs_at_once == 2
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    assert tune._count_parallel_trials(job) == 1


def started(folder: Path) -> subprocess.Popen[bytes]:
    """`tune` with two short trials, one after the other, over the pictures in `folder`, from there."""
    command = [
        sys.executable, "-m", "jobs", "tune", "--dataset", "images", "--output", "search", "--space",
        "space.yaml", "--trials", "2", "--max-concurrent", "1", "--grace-epochs", "1", "--reduction", "2",
        "--model", "scratch:tiny", "--image-size", "16", "--patch-size", "8", "--layers", "1",
        "--batch-size", "6", "--epochs", "3", "--splits.validation", "0.25", "--splits.test", "0.25",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True)


def first_epochs(search: Path) -> dict[str, str]:
    """Trial -> the line of its first epoch, for those in a later epoch: the first is in a checkpoint."""
    histories = {file.parent.name: file.read_text() for file in search.glob("trials/*/metrics.jsonl")}
    return {name: text.splitlines()[0] for name, text in histories.items() if text.count("\n") > 1}


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_search_goes_on_with_its_trials_and_finds_a_recipe_that_trains(tmp_path):
    image_folder(tmp_path / "images", per_class=8)
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE))
    search = tmp_path / "search"
    first = started(tmp_path)
    while not (begun := first_epochs(search)):
        assert first.poll() is None
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (search / "tune.json").exists()

    assert started(tmp_path).wait(400) == 0
    with (search / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["trial"] for row in rows} >= set(begun), "the search started over"
    assert first_epochs(search).items() >= begun.items(), "a trial started over"
    content = json.loads((search / "tune.json").read_text())
    assert len(rows) == content["trials"] == 2
    assert {row["finetune.freeze"] for row in rows} <= {"none", "backbone"}
    best = search / "best.yaml"
    settings = TrainConfig.parse(["--config", str(best), "--output", "x"], command="train")
    recipe = part_of(settings, Recipe)
    assert recipe.optimizer.learning_rate == pytest.approx(content["best"]["optimizer.learning_rate"])
    assert yaml.safe_load(best.read_text())["finetune"]["freeze"] == content["best"]["finetune.freeze"]


def test_a_finished_search_is_not_repeated_and_another_is_refused(tmp_path):
    data = dataset.load(
        DataSettings(str(image_folder(tmp_path / "images")), splits=Splits(validation=0.25, test=0.25))
    )
    job = fit.plan_job(data, replace(RECIPE, batch_size=6), str(tmp_path / "search"), Resources())
    search = tune.Search(trials=2, grace_epochs=1, reduction=2)
    assert tune.refuse_another(job, SPACE, search) is None
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / runs.RECIPE).write_bytes(runs.as_json(tune.search_identity(job, SPACE, search)))
    (tmp_path / "search" / tune.MARKER).write_text('{"trials": 2}')
    assert tune.refuse_another(job, SPACE, search) == {"trials": 2}
    with pytest.raises(InputError, match="trials"):
        tune.refuse_another(job, SPACE, replace(search, trials=3))
