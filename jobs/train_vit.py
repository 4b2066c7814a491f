"""`iab-vision train`: check everything that can be checked, start Ray, train, say how good the model is.

    iab-vision train --dataset photos/labels.csv --output run --model scratch:tiny --image-size 64 \\
        --patch-size 8 --num-workers 2 --epochs 20

On 2 CPU cores with bf16 instructions the photos of the project's benchmark (5,164 in 18 classes) take
some 15 minutes (BENCHMARKS.md has time and accuracy). Exit code 0 for a finished run, then and ever after.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs import cluster
from jobs.config import RecipeConfig, TrainConfig
from jobs.errors import checking_input
from jobs.settings import part_of
from jobs.training_progress import TrainingProgress
from pipelines.messages import JobFailed

log = logging.getLogger(__name__)


def run(config: TrainConfig) -> int:
    """Train, or say that it is done; upload the model where that is asked for, also of a finished run."""
    from huggingface_hub.utils import validate_repo_id

    from pipelines.training import fit, runs

    with checking_input():
        if config.push_to_hub:
            validate_repo_id(config.push_to_hub)
        job = fit.plan_job(labelled(config), recipe_of(config), config.output, resources_of(config))
        done = runs.finished(config.output, job.recipe, job.data)
    if done is None:
        done = trained(config, job)
    else:
        log.info("%s is a finished run already; it is not trained again", config.output)
    if config.push_to_hub:
        push_to_hub(config.output, config.push_to_hub)
    tell(done.content)
    return 0


def trained(config: TrainConfig, job: Any) -> Any:
    """The run, finished on a cluster."""
    from pipelines.datasets.pixels import IngestError
    from pipelines.training import fit

    with cluster.ray_cluster(config.ray_address, num_cpus=config.num_cpus):
        with checking_input():
            job = replace(job, resources=job.resources.on_cluster(config.use_gpu))
        with TrainingProgress(job.recipe.metric_for_best_model) as progress:
            try:
                return fit.fit(job, config.cache, progress)
            except (fit.TrainingFailed, IngestError) as error:
                raise JobFailed(str(error)) from error


def resources_of(config: TrainConfig) -> Any:
    """Where the run happens, within the settings."""
    from pipelines.training.resources import Resources

    return part_of(config, Resources, use_gpu=False)  # until the cluster is known


def push_to_hub(output: str, repository: str) -> None:
    """Upload best/ to the Hugging Face hub, with the token of its own environment.

    Raises:
        JobFailed: the hub refused, or could not be reached.
    """
    import tempfile

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    from pipelines.storage import storage, uris
    from pipelines.training import runs

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


def labelled(config: RecipeConfig) -> Any:
    """The dataset that the settings name."""
    from pipelines.datasets import dataset
    from pipelines.datasets.settings import DataSettings

    return dataset.load(part_of(config, DataSettings, uri=config.dataset))


def recipe_of(config: RecipeConfig) -> Any:
    """The recipe within the settings."""
    from pipelines.training.recipe import Recipe

    return part_of(config, Recipe)


def tell(content: Any) -> None:
    """The result in a few lines."""
    from pipelines.training.model_card import HEADLINES

    split = "test" if content["test"] else "validation"
    shown = {name: content[split][name] for name in HEADLINES if name in content[split]}
    log.info("%s: %s", split, ", ".join(f"{name} {value:.4f}" for name, value in shown.items()))
    log.info(
        "best epoch %s of %s, %.0f s in all; temperature %.2f",
        content["best"]["epoch"], content["recipe"]["epochs"], content["seconds"], content["temperature"],
    )  # fmt: skip
