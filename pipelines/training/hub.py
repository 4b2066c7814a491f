"""A finished model on the Hugging Face hub: its card, and its upload into a private repository."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
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
    split = "test" if content["test"] else "validation"
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipelines.training"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - Markdown
    )
    return environment.get_template("card.md").render(
        head=_front_matter(content, split).to_yaml().strip(),
        run=content,
        split=split,
        dataset=redact(content["dataset"]["uri"]),
        paths=paths,
        headlines=HEADLINES,
    )


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
