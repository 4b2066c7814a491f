"""Every settings file of the project is what its command takes, and says how it is run."""

import importlib.util
import itertools
import re
from pathlib import Path

import pytest

from jobs.config import TrainConfig
from jobs.settings import part_of
from pipelines.messages import InputError
from pipelines.training.recipe import Recipe
from pipelines.training.tracking import refuse_missing

CONFIGS = sorted((Path(__file__).parents[2] / "jobs" / "configs").glob("train_*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_training_recipe_is_accepted_whole(path):
    settings = TrainConfig.parse(
        ["--config", str(path), "--dataset", "images", "--output", "run"], command="train"
    )
    recipe = part_of(settings, Recipe)
    assert recipe != Recipe()
    resolved = recipe.resolved(multi_label="multi" in path.stem)
    assert resolved.micro_batch(settings.num_workers) >= 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_training_recipe_opens_with_command_duration_machine_and_expected_result(path):
    head = list(itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    command = "\n".join(line for line in head if line.startswith("#     "))
    assert f"iab-vision train --config jobs/configs/{path.name}" in command
    for fact in ("Duration", "Machine", "Expected result"):
        assert [line for line in head if re.match(rf"# {fact}: \w", line)], f"{path.name} does not say {fact}"


def test_local_paths_of_training_hold_in_workers_with_another_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("before", "best").mkdir(parents=True)
    here = TrainConfig(dataset="images", output="run", model="before/best", label_map="map.csv")
    assert (here.dataset, here.output) == (str(tmp_path / "images"), str(tmp_path / "run"))
    assert (here.model, here.label_map) == (str(tmp_path / "before/best"), str(tmp_path / "map.csv"))
    away = TrainConfig(dataset="s3://bucket/images", output="gs://bucket/run", model="google/vit")
    assert (away.dataset, away.output) == ("s3://bucket/images", "gs://bucket/run")
    assert away.model == "google/vit"


def test_scratch_and_pretrained_models_get_their_own_defaults():
    scratch = Recipe(model="scratch:tiny").resolved(multi_label=False)
    tuned = Recipe(model="some/model").resolved(multi_label=True)
    assert scratch.optimizer.peak > tuned.optimizer.peak
    assert (scratch.image_size, scratch.patch_size, tuned.image_size) == (224, 16, None)
    assert (scratch.metric_for_best_model, tuned.metric_for_best_model) == ("accuracy", "map")


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"epochs": 0}, "(?s)epochs.*greater than 0"),
        ({"patch_size": 8}, "scratch"),
        ({"target_precision": 1.5}, "target_precision"),
    ],
)
def test_impossible_recipes_are_refused_by_name(keywords, words):
    with pytest.raises(ValueError, match=words):
        Recipe(**keywords)


def test_a_batch_that_cannot_be_shared_evenly_is_refused_with_the_multiple():
    with pytest.raises(InputError, match="multiple of 3"):
        Recipe(batch_size=64).micro_batch(3)


def test_a_tracker_that_is_not_installed_is_refused_before_training():
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    with pytest.raises(InputError, match=r"iab-vision\[wandb\]"):
        refuse_missing(["wandb"])
