"""The search space is checked against the recipe; a search leaves a table, a plot and a usable recipe."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from small_training import RECIPE, image_folder

from jobs.config import TrainConfig
from jobs.settings import plain
from jobs.train_vit import labelled, recipe_of
from pipelines import datasets, fitting, runs, tuning
from pipelines.recipe import Columns, DataSettings, Ingest, Splits
from pipelines.resources import Resources

SPACE = {
    "optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]},
    "network.freeze": {"choice": ["none", "backbone"]},
}


def test_the_space_that_comes_with_the_project_fits_the_recipe():
    packaged = Path(tuning.__file__).parents[1] / "jobs" / "configs" / "tune_space.yaml"
    space = tuning.read_space(str(packaged))
    assert set(tuning.distributions(space, RECIPE)) >= {
        "optimizer.learning_rate",
        "batch_size",
        "augment.crop_area",
    }


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"optimizer.learnin_rate": {"uniform": [0, 1]}}, "learnin_rate"),
        ({"image_size": {"choice": [32, 64]}}, "cannot be searched"),
        ({"batch_size": [32, 64]}, "choice"),
        ({"batch_size": {"any_of": [32]}}, "choice"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_by_name(space, words):
    with pytest.raises(tuning.SpaceError, match=words):
        tuning.distributions(space, RECIPE)


def test_values_reach_their_sections_and_are_checked_there():
    found = tuning.applied(RECIPE, {"optimizer.layer_decay": 0.7, "batch_size": 8})
    assert found.optimizer.layer_decay == 0.7 and found.batch_size == 8
    assert found.optimizer.weight_decay == RECIPE.optimizer.weight_decay
    with pytest.raises(ValueError, match="layer_decay"):
        tuning.applied(RECIPE, {"optimizer.layer_decay": 2.0})


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
    plan = fitting.plan(datasets.load(settings), RECIPE, str(tmp_path / "search"), Resources())
    how = Ingest(mode="disk", margin=1.5)
    text = tuning.recipe_yaml(plan.recipe, plan, how, {"score": 0.5, "epochs": 2}).decode()
    assert "hunter2" not in text and "give those settings on the command line" in text
    (tmp_path / "best.yaml").write_text(text)
    config = TrainConfig.parse(["--config", str(tmp_path / "best.yaml"), "--output", "x"], command="train")
    assert plain(config.ingest) == how
    again = recipe_of(config).resolved(multi_label=False)
    searched = json.loads(runs.as_json(runs.identity(plan.recipe, plan.data)))
    assert searched["images"]["train"]
    runs.refuse_mismatch("x", searched, runs.identity(again, labelled(config)))


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_finds_a_recipe_that_trains(ray_cluster, tmp_path):
    data = datasets.load(
        DataSettings(str(image_folder(tmp_path / "images")), splits=Splits(validation=0.25, test=0.25))
    )
    plan = fitting.plan(data, replace(RECIPE, batch_size=6), str(tmp_path / "search"), Resources())
    search = tuning.Search(trials=2, grace_epochs=1, reduction=2)
    assert tuning.refuse_another(plan, SPACE, search) is None
    content = tuning.tune_recipe(plan, SPACE, search, Ingest())
    with (tmp_path / "search" / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == content["trials"] == 2
    assert {row["network.freeze"] for row in rows} <= {"none", "backbone"}
    assert b"<svg" in (tmp_path / "search" / "trials.svg").read_bytes()
    best = tmp_path / "search" / "best.yaml"
    settings = TrainConfig.parse(["--config", str(best), "--output", "x"], command="train")
    recipe = recipe_of(settings)
    assert recipe.optimizer.learning_rate == pytest.approx(content["best"]["optimizer.learning_rate"])
    assert yaml.safe_load(best.read_text())["network"]["freeze"] == content["best"]["network.freeze"]
    assert tuning.refuse_another(plan, SPACE, search) == content
    with pytest.raises(runs.RunMismatch, match="trials"):
        tuning.refuse_another(plan, SPACE, replace(search, trials=3))
