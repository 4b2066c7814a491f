"""A whole training run from the driver: ingest, Ray Train workers, the best model measured and described.

`fit` fills the run folder: `recipe.json` first, `checkpoints/` and `metrics.jsonl` while it trains, then
`report/` and `best/`, and `run.json` last. The same call on an unfinished folder continues it.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.datasets import splits
from pipelines.datasets.dataset import LabelledData, refuse_untrainable
from pipelines.datasets.settings import ImageCache
from pipelines.evaluation import metrics
from pipelines.messages import InputError, JobFailed, redact, root_cause
from pipelines.specs import ImageSpec, ModelSpec
from pipelines.storage import storage, uris
from pipelines.training import checkpoints, decoded, evaluate, layers, model_files, recalibrate, runs
from pipelines.training import model as vit
from pipelines.training.decoded import DecodedData
from pipelines.training.hub import model_card
from pipelines.training.loop import Diverged, train_worker
from pipelines.training.losses import ClassCounts, prior_shift
from pipelines.training.recipe import Recipe
from pipelines.training.resources import Resources
from pipelines.training.task import Task, validation_name
from pipelines.training.tracking import Listener, ProgressQueue, refuse_missing

NO_SHIFT = 1e-9
"""Shifts of a logit below this are rounding errors: nothing was balanced."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingJob:
    """A run that can start: everything that can be refused before Ray wakes has been checked."""

    data: LabelledData
    recipe: Recipe
    """Resolved."""
    spec: ImageSpec
    """Pixels that the model takes."""
    output: str
    resources: Resources

    @property
    def model_spec(self) -> ModelSpec:
        data = self.data
        return ModelSpec(data.classes, data.settings.taxonomy, self.spec, data.multi_label)


def plan_job(data: LabelledData, recipe: Recipe, output: str, resources: Resources) -> TrainingJob:
    """The run of this recipe on this dataset.

    Raises:
        InputError: nothing can be learned from the dataset, the model cannot be built, the batch cannot be
            divided among the workers, a tracker is not installed, or validation does not give the metric.
    """
    refuse_untrainable(data)
    recipe = recipe.resolved(multi_label=data.multi_label)
    recipe.micro_batch(resources.num_workers)
    refuse_missing(resources.trackers)
    refuse_unknown_metric(
        recipe.metric_for_best_model, data.targets()[data.indices(splits.VALIDATION)], len(data.classes)
    )
    spec = vit.image_spec(recipe)
    recipe = replace(recipe, image_size=spec.height if spec.height == spec.width else None)
    model = vit.build(recipe, vit.Classes(data.classes, data.multi_label))
    layers.parameter_groups(model, recipe.optimizer)
    return TrainingJob(data, recipe, spec, output, resources)


def refuse_unknown_metric(name: str, truth: npt.NDArray[Any], n_classes: int) -> None:
    """Raise InputError when validation with this truth will not yield the metric that is to select."""
    if not len(truth):
        return  # refused when it turns out that none can be read
    rows = _representative_rows(truth)
    logits_nc = np.zeros((len(rows), n_classes), np.float32)
    known = {"validation_loss", *metrics.classification(logits_nc, truth[rows])}
    if name not in known:
        raise InputError(
            f"metric_for_best_model is {name}; these {len(truth)} validation images give "
            f"{', '.join(sorted(known))}. Choose one of these, or give validation images of more classes"
        )


def _representative_rows(truth: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """A few rows that give the same metrics as all: of several classes, or with and without a label."""
    if truth.ndim == 1:
        return np.unique(truth, return_index=True)[1][:8]
    mixed = np.flatnonzero(truth.any(axis=0) & ~truth.all(axis=0))
    return np.unique(truth[:, mixed[0] if len(mixed) else 0], return_index=True)[1]


def fit(job: TrainingJob, how: ImageCache, listen: Listener | None = None) -> runs.Run:
    """Train, pick, measure, describe; Ray is running.

    Raises:
        JobFailed: too many images cannot be used, or more failures than the resources allow.
    """
    started = time.time()
    log.info("reading the images")
    prepared = decoded.prepare(job.data, job.spec, how, seed=job.recipe.seed)
    runs.begin(job.output, job.recipe, job.data)
    result = train(job, prepared, listen)
    files, best = best_model(result)
    train_s = time.time() - started
    files, shift = put_back_prior(files, shift_of(job, prepared))
    log.info("epoch %s is the best; measuring and calibrating it", best["epoch"])
    results = evaluate.score_splits(prepared, job.model_spec, files, job.resources)
    recalibrate.write_scores(job.output, results)
    calibrated = evaluate.calibrate(
        {name: result.scored for name, result in results.items()},
        job.model_spec,
        job.data.taxonomy,
        evaluate.rule_of(job.recipe),
    )
    evaluate.log_unpublished(calibrated, job.data.taxonomy, evaluate.rule_of(job.recipe))
    model_spec = calibrated.spec
    results = {name: replace(one, scored=calibrated.scored[name]) for name, one in results.items()}
    about = {
        "model": job.recipe.model,
        "dataset": redact(job.data.settings.uri),
        "taxonomy": job.data.taxonomy.name,
    }
    slices = {name: one.slices for name, one in results.items()}
    found = evaluate.evaluate_splits(
        calibrated.scored, model_spec, job.data.taxonomy, about=about, slices=slices
    )
    log.info("drawing the report")
    evaluate.write_run_report(results, found, prepared, job.recipe, files=files, output=job.output)
    content = {
        **runs.identity(job.recipe, job.data),
        "image_spec": asdict(job.spec),
        "multi_label": job.data.multi_label,
        "best": best,
        "prior_shift": dict(zip(job.data.classes, shift.tolist(), strict=True)),
        **{name: {} for name in evaluate.MEASURED},
        **recalibrate.describe(calibrated, found),
        "data": prepared.account(),
        "resources": asdict(job.resources),
        "cache": {**asdict(how), "mode": prepared.mode},
        "images_per_s": best.get("images_per_s"),
        "train_seconds": train_s,
        "seconds": time.time() - started,
    }
    paths = {one: job.data.taxonomy.path(one) for one in job.data.classes}
    described = {
        model_files.CONFIG: model_files.with_paths(files[model_files.CONFIG], paths),
        model_files.SIDECAR: model_files.sidecar_json(model_spec).encode(),
        "README.md": model_card(content, paths).encode(),
    }
    folder = storage.open_storage(job.output)
    for name, payload in {**files, **described}.items():
        folder.put(f"{runs.BEST}/{name}", payload)
    return runs.finish(job.output, content)


def train(
    job: TrainingJob, prepared: DecodedData, listen: Listener | None = None, callbacks: tuple[Any, ...] = ()
) -> Any:
    """Run the workers to the end of the recipe; returns Ray Train's result."""
    from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train import TrainingFailedError as RayTrainingFailed
    from ray.train.torch import TorchTrainer

    resources = job.resources
    checkpoints.repair_index(uris.join(job.output, runs.CHECKPOINTS))
    filesystem, path = runs.ray_storage(job.output)
    per_worker = {"CPU": resources.cpus_per_worker, **({"GPU": 1} if resources.use_gpu else {})}
    shards = decoded.training_shards(prepared, job.recipe.class_balance, seed=job.recipe.seed)
    parts = decoded.validation_shards(prepared, resources.num_workers)
    measured = {validation_name(rank): part for rank, part in enumerate(parts)}
    with ProgressQueue(listen) as messages:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"task": task_of(job, prepared, messages.queue)},
            datasets={"train": shards, **measured},
            dataset_config=DataConfig(datasets_to_split=["train"] if prepared.streams else []),
            scaling_config=ScalingConfig(
                num_workers=resources.num_workers, use_gpu=resources.use_gpu, resources_per_worker=per_worker
            ),
            run_config=RunConfig(
                name=runs.CHECKPOINTS,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=resources.max_failures),
                checkpoint_config=CheckpointConfig(
                    num_to_keep=resources.num_to_keep, checkpoint_score_attribute="score"
                ),
                callbacks=[*callbacks, _stop_when_diverged()],
            ),
        )
        try:
            return trainer.fit()
        except RayTrainingFailed as error:
            failures = getattr(error, "worker_failures", {}).values()
            first = next(iter(failures), getattr(error, "controller_failure", error))
            raise JobFailed(
                f"training failed: {root_cause(str(first))}; what was checkpointed is kept, and the same "
                "command continues it"
            ) from error


def _stop_when_diverged() -> Any:
    """A callback of Ray Train that ends a diverged run: another attempt would diverge at the same step."""
    from ray.train import UserCallback

    class StopWhenDiverged(UserCallback):  # type: ignore[misc]
        """Ray retries what workers raise, not what a callback raises."""

        def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if isinstance(error, Diverged):
                    raise error

    return StopWhenDiverged()


def task_of(job: TrainingJob, prepared: DecodedData, queue: Any) -> Task:
    """What every worker is told."""
    strata, workers = prepared.strata(), job.resources.num_workers
    drawn = decoded.one_pass(strata, job.recipe.class_balance, np.random.default_rng(job.recipe.seed))
    return Task(
        recipe=job.recipe,
        model_spec=job.model_spec,
        stored_spec=prepared.stored_spec,
        train_rows=prepared.rows[splits.TRAIN],
        strata=strata,
        validation_rows=prepared.rows[splits.VALIDATION],
        class_counts=job.data.class_counts(prepared.rows[splits.TRAIN][drawn]),
        streams=prepared.streams,
        max_unreadable_fraction=prepared.how.max_unreadable_fraction,
        epoch_images=(len(drawn) - len(drawn) % workers) * (job.recipe.augment.repeats or 1),
        run_uri=job.output,
        runs_at_once=job.resources.runs_at_once,
        checkpoint_every_steps=job.resources.checkpoint_every_steps,
        log_every_steps=job.resources.log_every_steps,
        trackers=job.resources.trackers,
        progress_queue=queue,
    )


def shift_of(job: TrainingJob, prepared: DecodedData) -> npt.NDArray[np.float64]:
    """What the run's class balance added to each logit."""
    balance, rows = job.recipe.class_balance, prepared.rows[splits.TRAIN]
    drawn = decoded.one_pass(prepared.strata(), balance, np.random.default_rng(job.recipe.seed))
    return prior_shift(
        balance,
        drawn=ClassCounts(job.data.class_counts(rows[drawn]), len(drawn)),
        natural=ClassCounts(job.data.class_counts(rows), len(rows)),
        multi_label=job.data.multi_label,
    )


def put_back_prior(
    files: dict[str, bytes], shift: npt.NDArray[np.float64]
) -> tuple[dict[str, bytes], npt.NDArray[np.float64]]:
    """The model's files without the class balance's shift, and what was taken from each logit.

    Nothing is taken where nothing was added, or where the last layer has no bias to take it from.
    """
    if np.abs(shift).max() < NO_SHIFT:
        return files, np.zeros_like(shift)
    last = vit.last_linear(evaluate.load_network(files))
    biases = [f"{name}.bias" for name, layer in last.items() if layer.bias is not None]
    if not biases:
        log.warning("the last layer has no bias: the probabilities keep the balanced class frequencies")
        return files, np.zeros_like(shift)
    return model_files.put_back(files, shift, biases), shift


def best_model(result: Any) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Files of the best checkpoint's model, and the line of its epoch."""
    checkpoint, line = max(result.best_checkpoints, key=lambda pair: pair[1]["score"])
    with checkpoint.as_directory() as folder:
        model = Path(folder, checkpoints.MODEL_FOLDER)
        return {file.name: file.read_bytes() for file in sorted(model.iterdir())}, dict(line)
