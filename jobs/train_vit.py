"""`iab-vision train`: check everything that can be checked, start Ray, train, say how good the model is.

    iab-vision train --dataset photos/labels.csv --output run --model scratch:tiny --image-size 64 \\
        --patch-size 8 --num-workers 2 --epochs 20

On 2 CPU cores with bf16 instructions the photos of the project's benchmark (5,164 in 18 classes) take
some 15 minutes (BENCHMARKS.md has time and accuracy). Exit code 0 for a finished run, however often.
"""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jobs import cluster
from jobs.config import TrainConfig, TuneConfig
from jobs.errors import checking_input
from jobs.label_map import load_dataset
from jobs.progress import TrainingProgress
from jobs.settings import part_of
from pipelines.datasets.settings import DataSettings
from pipelines.messages import JobFailed, redact
from pipelines.training.recipe import Recipe
from pipelines.training.resources import Resources

if TYPE_CHECKING:
    from pipelines.datasets.dataset import LabelledData

log = logging.getLogger(__name__)


def run(config: TrainConfig) -> int:
    """Train, or say that it is done; upload the model where that is asked for, also of a finished run."""
    from pipelines.training import fit, hub, runs

    with checking_input():  # settings first: they cost nothing
        if config.push_to_hub:
            hub.check_name(config.push_to_hub)
        recipe = part_of(config, Recipe)
        recipe.micro_batch(config.num_workers)
        resources = part_of(config, Resources, use_gpu=False)  # until the cluster is known
        job = fit.plan_job(load_labelled(config), recipe, config.output, resources)
        done = runs.finished(config.output, job.recipe, job.data)
    if done is None:
        done = train(config, job)
    else:
        log.info("%s is complete already: nothing is trained", config.output)
    if config.push_to_hub:
        hub.push(config.output, config.push_to_hub)
    tell(done.content, config, job.data.taxonomy)
    return 0


def train(config: TrainConfig, job: Any) -> Any:
    """The run, finished on a cluster."""
    from pipelines.training import fit

    if epochs := epochs_done(config.output):
        log.info("continuing after epoch %d", epochs)
    try:
        with cluster.ray_cluster(config.ray_address, num_cpus=config.num_cpus):
            with checking_input():
                job = replace(job, resources=job.resources.on_cluster(config.use_gpu))
            with TrainingProgress(job.recipe.metric_for_best_model) as progress:
                return fit.fit(job, config.cache, progress)
    except (KeyboardInterrupt, SystemExit):  # Ray turns a signal into SystemExit while it starts
        epochs = epochs_done(config.output)
        kept = f"the model of epoch {epochs} is kept" if epochs else "no epoch was finished"
        raise JobFailed(f"stopped; {kept}, and the same command continues") from None


def epochs_done(output: str) -> int:
    """Epochs that a run has finished."""
    from pipelines.training import runs

    return int(max((line["epoch"] for line in runs.history(output)), default=0))


def load_labelled(config: TrainConfig | TuneConfig) -> "LabelledData":
    """The dataset that the settings name."""
    settings = part_of(config, DataSettings, uri=config.dataset)
    flat = ", or take the labels as they are with --taxonomy labels"
    return load_dataset(settings, config.output, otherwise=flat)


def tell(content: Any, config: TrainConfig, taxonomy: Any) -> None:
    """The result in a few lines, and what comes next."""
    from pipelines.bundle import categories
    from pipelines.training.hub import HEADLINES

    split = "test" if content["test"] else "validation"
    shown = {name: content[split][name] for name in HEADLINES if name in content[split]}
    log.info("%s: %s", split, ", ".join(f"{name} {value:.4f}" for name, value in shown.items()))
    log.info(
        "best epoch %.4g of %s, %.0f s in all; temperature %.2f",
        content["best"]["epoch"], content["recipe"]["epochs"], content["seconds"], content["temperature"],
    )  # fmt: skip
    listed = categories.list_categories(taxonomy, content["classes"], content["thresholds"])
    wanted = content["recipe"]["target_precision"]
    log.info("published at precision %.2f: %s", wanted, categories.count_published(listed))
    run = redact(config.output.rstrip("/"))
    log.info("report: %s/report/report.html", run)
    log.info(
        "next: iab-vision export --checkpoint %s --images %s --output BUNDLE", run, redact(config.dataset)
    )
