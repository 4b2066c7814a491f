"""`iab-vision train`: check everything that can be checked, start Ray, train, say how good the model is.

    iab-vision train --dataset photos/labels.csv --output run --model scratch:tiny --image-size 64 \\
        --patch-size 8 --num-workers 2 --epochs 20

On 2 CPU cores with bf16 instructions the photos of the project's benchmark (5,164 in 17 classes) take
about 15 minutes (BENCHMARKS.md has the accuracy). Exit code 0 for a finished run, then and ever after.
"""

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs import cluster
from jobs.config import RecipeConfig, TrainConfig, plain
from jobs.errors import JobFailed, checking_input

log = logging.getLogger(__name__)

SECTIONS = ("network", "optimizer", "loss", "balance", "augment", "stopping")
SCALARS = (
    "model", "image_size", "patch_size", "layers", "epochs", "batch_size", "seed", "precision", "select_by",
    "target_precision",
)  # fmt: skip


def run(config: TrainConfig) -> int:
    """Train, or say that it is done."""
    from pipelines import fitting, runs
    from pipelines.ingest import IngestError

    with checking_input():
        plan = fitting.plan(labelled(config), recipe_of(config), config.output, resources_of(config))
        done = runs.finished(config.output, plan.recipe, plan.data)
    if done is not None:
        log.info("%s is a finished run already; nothing to do", config.output)
        tell(done.content)
        return 0
    with cluster.ray_cluster(config.ray_address, num_cpus=config.num_cpus):
        with checking_input():
            plan = replace(plan, resources=plan.resources.on_cluster(config.use_gpu))
        with TrainingProgress(plan.recipe.select_by) as progress:
            try:
                done = fitting.fit(plan, plain(config.ingest), progress)
            except (fitting.TrainingFailed, IngestError) as error:
                raise JobFailed(str(error)) from error
    if config.push_to_hub:
        push_to_hub(config.output, config.push_to_hub)
    tell(done.content)
    return 0


def resources_of(config: TrainConfig) -> Any:
    """Where the run happens, within the settings."""
    from pipelines.resources import Resources

    return Resources(
        num_workers=config.num_workers,
        cpus_per_worker=config.cpus_per_worker,
        checkpoint_every_steps=config.checkpoint_every_steps,
        checkpoints_to_keep=config.checkpoints_to_keep,
        max_failures=config.max_failures,
        trackers=tuple(config.trackers),
    )


def push_to_hub(output: str, repository: str) -> None:
    """Upload best/ to the Hugging Face hub, with the token of its own environment."""
    import tempfile

    from huggingface_hub import HfApi

    from pipelines import runs, storage

    folder = storage.open_storage(storage.join(output, runs.BEST))
    with tempfile.TemporaryDirectory() as local:
        for entry in folder.list():
            Path(local, entry.path).write_bytes(folder.read(entry.path))
        hub = HfApi()
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(folder_path=local, repo_id=repository)


def labelled(config: RecipeConfig) -> Any:
    """The dataset that the settings name."""
    from pipelines import datasets

    return datasets.load(
        config.dataset,
        taxonomy_name=config.taxonomy,
        label_map=config.label_map,
        tier=config.tier,
        columns=plain(config.columns),
        split=plain(config.splits),
    )


def recipe_of(config: RecipeConfig) -> Any:
    """The recipe within the settings."""
    from pipelines.recipe import Recipe

    return Recipe(
        **{name: getattr(config, name) for name in SCALARS},
        **{name: plain(getattr(config, name)) for name in SECTIONS},
    )


def tell(content: Any) -> None:
    """The result in a few lines."""
    split = "test" if content["test"] else "validation"
    shown = {name: value for name, value in content[split].items() if isinstance(value, float)}
    log.info("%s: %s", split, ", ".join(f"{name} {value:.4f}" for name, value in shown.items()))
    log.info(
        "best epoch %s of %s, %.0f s in all; temperature %.2f",
        content["best"]["epoch"], content["recipe"]["epochs"], content["seconds"], content["temperature"],
    )  # fmt: skip


class TrainingProgress:
    """Shows loss, validation metric, images/s and time left: a bar on a terminal, else a line at times."""

    LINE_EVERY_S = 30.0

    def __init__(self, metric: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.metric = metric
        self.console = Console(stderr=True)
        columns = (TextColumn("training"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console)
        self.task = self.bar.add_task("", total=None, note="decoding")
        self.first: tuple[int, float] | None = None
        self.epoch, self.spoke = -1, 0.0

    def __enter__(self) -> "TrainingProgress":
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, message: dict[str, Any]) -> None:
        done, total, now = message["done"], message["total"], time.monotonic()
        self.first = self.first or (done, now)
        metric = f", {self.metric} {message['metric']:.4f}" if message["metric"] is not None else ""
        loss = f"loss {message['loss']:.3f}" if message["loss"] is not None else ""
        note = f"epoch {message['epoch'] + 1}, {loss}{metric}, {message['images_per_s']:,.0f} images/s"
        self.bar.update(self.task, completed=done, total=total, note=note)
        if not self.console.is_terminal and (
            message["epoch"] != self.epoch or now - self.spoke >= self.LINE_EVERY_S
        ):
            self.epoch, self.spoke = message["epoch"], now
            rate = (done - self.first[0]) / max(now - self.first[1], 1e-9)
            left = f", about {(total - done) / rate:.0f} s left" if rate else ""
            log.info("%s of %s steps, %s%s", f"{done:,}", f"{total:,}", note, left)
