"""A finished model on the Hugging Face hub: its card, and its upload into a private repository."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from pipelines.messages import InputError, JobFailed, redact
from pipelines.storage import storage, uris
from pipelines.training import runs
from pipelines.training.recipe import SCRATCH

HEADLINES = (
    "accuracy",
    "accuracy@3",
    "balanced_accuracy",
    "map",
    "f1_micro",
    "f1_macro",
    "mcc",
    "log_loss",
    "ece",
)


def check_name(repository: str) -> None:
    """Raise InputError when the hub would refuse this name."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub {repository}: {error}") from error


def push(output: str, repository: str) -> None:
    """Upload best/ to the Hugging Face hub, with the token of its own environment.

    Raises:
        JobFailed: the hub refused, or could not be reached.
    """
    folder = storage.open_storage(uris.join(output, runs.BEST))
    with tempfile.TemporaryDirectory() as local:
        for entry in folder.list():
            Path(local, entry.path).write_bytes(folder.read(entry.path))
        hub = HfApi()
        try:
            hub.create_repo(repository, private=True, exist_ok=True)
            hub.upload_folder(folder_path=local, repo_id=repository)
        except (HTTPError, OSError) as error:
            raise JobFailed(
                f"the model is in {folder.uri}, but its upload to {repository} failed: "
                f"{' '.join(str(error).split())}. See HF_TOKEN and the network; the same command uploads it "
                "without training again"
            ) from error


def model_card(content: Mapping[str, Any], paths: Mapping[str, str]) -> str:
    """The card of a run, from the content of its run.json and the path of each class."""
    recipe, data = content["recipe"], content["data"]
    split = "test" if content["test"] else "validation"
    images = ", ".join(f"{count} {name}" for name, count in data["images"].items())
    counts = "\n".join(
        f"| {paths[label]} | `{label}` | {count} |" for label, count in data["class_counts"].items()
    )
    numbers = "\n".join(
        f"| {name} | {content[split][name]:.4f} |" for name in HEADLINES if name in content[split]
    )
    spec = content["image_spec"]
    kind = "several labels per image" if content["multi_label"] else "one label per image"
    return f"""---
{_front_matter(content, split).to_yaml().strip()}
---

# {recipe["model"]} for {len(content["classes"])} classes of {content["taxonomy"]}

An image classifier ({kind}) trained by iab-vision. `config.json` has the ids of its classes in the taxonomy
`{content["taxonomy"]}` (`id2label`) and their paths (`label_paths`); `iab_vision.json` holds the calibration
(temperature {content["temperature"]:.3f}) and each category's threshold.

## Data

{images} images from `{redact(content["dataset"]["uri"])}`; {len(data["unreadable"])} could not be read, \
{sum(data["duplicates_removed"].values())} were removed because their bytes are in another split too.

| class | id | training images |
|---|---|---|
{counts}

## Recipe

{recipe["epochs"]} epochs at {spec["height"]}x{spec["width"]} pixels, {recipe["batch_size"]} images per
step, seed {recipe["seed"]}; the best epoch was {content["best"]["epoch"]:.4g} by
{recipe["metric_for_best_model"]}. Everything else is in `run.json` of the run.

## Measured on the {split} split

| measure | value |
|---|---|
{numbers}

## Limits

The numbers hold for images like those it was trained on; another publisher's pictures need an evaluation
of their own (`iab-vision evaluate`). Every image gets a label, also one that shows none of the classes:
publish only what passes its threshold. The model sees {spec["height"]}x{spec["width"]} pixels, so small
print and small objects are lost. Nothing was done to find or remove bias in the training images.
"""


def _front_matter(content: Mapping[str, Any], split: str) -> ModelCardData:
    """What the hub reads: the task, the base model, and the measured values."""
    model = content["recipe"]["model"]
    dataset = redact(content["dataset"]["uri"])
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type="image-classification",
            dataset_name=dataset.rstrip("/").rsplit("/", 1)[-1],
            dataset_split=split,
            metric_type=name,
            metric_value=round(content[split][name], 4),
        )
        for name in HEADLINES
        if name in content[split]
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["vision", "iab-content-taxonomy"],
        base_model=None if model.startswith(SCRATCH) else model,
        model_name=f"{model} for {content['taxonomy']}",
        eval_results=results,
    )
