"""`iab-vision evaluate`: a bundle or a trained run on labelled images: every number, and a page to look at.

    iab-vision evaluate --bundle bundle --dataset photos/labels.csv --output evaluation
    iab-vision evaluate --checkpoint run --output evaluation      # the test images of the run's own dataset

In one process, decoding threads around one model: 1,750 photos through a small ViT take less than a minute
on 2 cores. A checkpoint also on the workers and GPUs of a Ray cluster. A bundle is measured as it is served
(ONNX Runtime, its own precision); a run as it was trained (PyTorch, float32, on GPUs where there are some),
with its learning curves and attention maps.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from jobs import cluster
from jobs.config import RayConfig
from jobs.errors import checking_input
from jobs.label_map import load_dataset
from jobs.settings import Folder, flags_of, part_of
from pipelines.bundle.settings import RuntimeSpec
from pipelines.datasets.settings import DataSettings, Splits
from pipelines.machine import cores
from pipelines.messages import InputError, redact
from pipelines.training.resources import Resources

if TYPE_CHECKING:
    from export.checkpoint import Checkpoint
    from pipelines.evaluation.models import EvaluatedModel
    from pipelines.evaluation.score import PredictImages

log = logging.getLogger(__name__)

OF_A_BUNDLE = {"precision", "provider", "batch_size", "allow_uncertified"}
"""Settings without a meaning for a checkpoint."""


class EvaluateConfig(
    flags_of(DataSettings, "label_map", "tier", "columns"),  # type: ignore[misc]
    flags_of(RuntimeSpec, "provider", "precision", "batch_size"),  # type: ignore[misc]
    flags_of(Resources, "num_workers"),  # type: ignore[misc]
    RayConfig,
):
    """Measure a bundle or a trained run on labelled images."""

    bundle: str | None = None
    """Bundle made by `iab-vision export`; or give `checkpoint`."""
    checkpoint: str | None = None
    """Run made by `iab-vision train`, or any Hugging Face image classifier's folder; or give `bundle`."""
    dataset: str | None = None
    """Labelled images: folder `<label>/image.jpg`, table of files and labels, or Hugging Face Parquet; unset:
    those that the model's run had."""
    output: Folder
    """Folder for `report.html`, `evaluation.json` and `evaluation.parquet`."""
    run: str | None = None
    """Run that made the bundle: its recorded splits hold for the images it knows; unset: `checkpoint`."""
    split: Literal["test", "validation", "train", "all"] = "test"
    """Which images are evaluated; `all` for a dataset that no model was trained on."""
    slices: list[str] = Field(default_factory=list)
    """Columns, such as the publisher, by whose values the accuracy is given too."""
    splits: Splits = Splits()
    """How images are divided when neither the run nor the dataset says."""
    engine: Literal["auto", "local", "ray"] = "auto"
    """`local`: in this process; `ray`: a checkpoint on workers of a cluster; `auto`: `ray` where an address
    names one."""
    use_gpu: bool | None = None
    """On a cluster, give each worker a GPU; unset: when there is one for each."""
    threads: int = Field(default=0, ge=0)
    """Decoding threads and CPU threads of the model; 0 is one per core."""
    allow_uncertified: bool = False
    """Judge a precision and provider that no certificate covers; the report says so."""


def run(config: EvaluateConfig) -> int:
    """Measure, write the page, its JSON and a row per image, and log the most important numbers."""
    refuse_settings(config)
    from pipelines.evaluation.evaluate import evaluate_model
    from pipelines.training.hub import HEADLINES

    with open_model(config) as model:
        with checking_input():
            recorded = recorded_splits(config)
            data = load_dataset(data_settings(config, model.spec.taxonomy), config.output)
        found = evaluate_model(
            model,
            data,
            config.split,
            recorded=recorded,
            output=config.output,
        )
    numbers = [f"{name} {found.overall[name]:.4f}" for name in HEADLINES if name in found.overall]
    log.info("%d images: %s", found.n_images, ", ".join(numbers))
    log.info("report: %s", config.output.rstrip("/") + "/report.html")
    return 0


def refuse_settings(config: EvaluateConfig) -> None:
    """Raise InputError unless there is one model, and no setting without a meaning for it."""
    if (config.bundle is None) == (config.checkpoint is None):
        raise InputError("give either --bundle or --checkpoint")
    if config.checkpoint is not None and (given := sorted(OF_A_BUNDLE & config.model_fields_set)):
        raise InputError(
            f"{', '.join(given)}: a checkpoint is evaluated in PyTorch and float32; these settings are for a "
            "bundle (--bundle)"
        )
    if config.bundle is not None and config.engine == "ray":
        raise InputError("--engine ray evaluates a checkpoint; a bundle is evaluated in this process")


def data_settings(config: EvaluateConfig, taxonomy: str) -> DataSettings:
    """The dataset, in the model's taxonomy; when all of it is used, its split column means nothing.

    Columns, label map and division are those of the model's run, if that had this dataset and none are given.
    Its tier is not needed: a label below a class of the model counts as that class.

    Raises:
        InputError: no dataset is given, and no run of the model is known.
    """
    from pipelines.inventory.listing import absolute
    from pipelines.training import runs

    run = model_run(config)
    recorded = runs.recorded_data_settings(run) if run else None
    dataset = config.dataset or (recorded and recorded.uri)
    if not dataset:
        raise InputError("give --dataset; only a model whose run is known has one of its own")
    own: dict[str, Any] = {"label_map": config.label_map, "columns": config.columns, "splits": config.splits}
    if recorded and recorded.uri in (redact(dataset), redact(absolute(dataset))):
        own |= {name: getattr(recorded, name) for name in own if name not in config.model_fields_set}
    if config.slices:
        own["columns"] = replace(own["columns"], slices=tuple(config.slices))
    if config.split == "all":
        own["columns"] = replace(own["columns"], split="")
    return DataSettings(dataset, taxonomy, tier=config.tier, **own)


def model_run(config: EvaluateConfig) -> str | None:
    """The folder of the run that made the model, where that is known."""
    from pipelines.training import runs

    return config.run or (config.checkpoint and runs.run_folder(config.checkpoint))


def recorded_splits(config: EvaluateConfig) -> dict[str, str] | None:
    """Recorded URI -> split, where the run that made the model is known and recorded them."""
    from pipelines.training import runs

    run = model_run(config)
    known = runs.recorded_splits(run) if run else None
    if known is None and config.run is not None:
        raise InputError(f"--run {config.run} holds no {runs.SPLITS}; give the folder of a run of `train`")
    return known


@contextmanager
def open_model(config: EvaluateConfig) -> Iterator["EvaluatedModel"]:
    """The bundle or the checkpoint that the settings name."""
    with ExitStack() as stack:
        with checking_input():
            if config.bundle is not None:
                model = bundle_model(config, config.bundle)
            else:
                from export.checkpoint import open_checkpoint

                found = stack.enter_context(open_checkpoint(config.checkpoint or ""))
                model = checkpoint_model(found, config)
        if config.checkpoint is not None and (
            config.engine == "ray" or (config.engine == "auto" and cluster.joins_cluster(config.ray_address))
        ):
            stack.enter_context(cluster.ray_cluster(config.ray_address, num_cpus=config.num_cpus))
            model = replace(model, predict=on_workers(found, config))
        yield model


def bundle_model(config: EvaluateConfig, uri: str) -> "EvaluatedModel":
    """The bundle's model, refused unless a certificate covers the session or the user allows it."""
    from jobs.certificate_gate import require_certificate
    from pipelines.bundle.bundle import open_bundle
    from pipelines.evaluation.models import load_bundle_model

    bundle = open_bundle(uri)
    spec = part_of(config, RuntimeSpec, threads=config.threads or cores())
    certified = require_certificate(bundle, spec, allow_uncertified=config.allow_uncertified)
    certificate = "covers it" if certified else "NONE (--allow-uncertified)"
    return load_bundle_model(uri, bundle, spec, certificate=certificate)


def checkpoint_model(found: "Checkpoint", config: EvaluateConfig) -> "EvaluatedModel":
    """The checkpoint's PyTorch model, with the history of the run that it came from where there is one."""
    import torch

    from pipelines.evaluation.models import EvaluatedModel, TorchModel
    from pipelines.evaluation.score import predict_on_threads
    from pipelines.training import runs

    network = found.network("sdpa").to("cuda" if torch.cuda.is_available() else "cpu")
    return EvaluatedModel(
        name=f"{found.source} ({found.architecture})",
        spec=found.spec,
        taxonomy=found.taxonomy,
        predict=partial(
            predict_on_threads,
            predict=TorchModel(network, found.spec),
            spec=found.spec.image_spec,
            threads=config.threads or cores(),
        ),
        network=network,
        history=runs.history(model_run(config) or ""),
    )


def on_workers(found: "Checkpoint", config: EvaluateConfig) -> "PredictImages":
    """The checkpoint on workers of the running cluster, which also fetch and decode, as training ends."""
    from pipelines.training.evaluate import predict_images

    with checking_input():
        resources = part_of(config, Resources, use_gpu=False).on_cluster(config.use_gpu)
    return partial(predict_images, files=found.files(), model_spec=found.spec, resources=resources)
