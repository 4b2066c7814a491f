"""A whole training run from the driver: ingest, Ray Train workers, best checkpoint, measured and described.

`fit` fills the run folder: `recipe.json` first, `checkpoints/` and `metrics.jsonl` while it trains, then
`best/` and `report/`, and `run.json` last. The same call on an unfinished folder continues it; on a
finished one it does nothing.
"""

import json
import logging
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines import calibration, checkpoints, evaluation, ingest, metrics, splits, storage, vit
from pipelines.checkpoints import Sidecar
from pipelines.datasets import LabelledData
from pipelines.evaluation import Evaluation, Scored
from pipelines.recipe import Ingest, Recipe
from pipelines.sampling import images_per_pass, one_pass
from pipelines.scoring import score
from pipelines.specs import DecodeLimits, ImageSpec, at_least
from pipelines.training import Task, train_worker

log = logging.getLogger(__name__)

RECIPE, MARKER, BEST, REPORT = "recipe.json", "run.json", "best", "report"
LIBRARIES = ("ray", "torch", "transformers", "numpy", "pillow", "pyarrow")
PROGRESS_POLL_S = 0.5


class RunMismatch(ValueError):
    """The output folder belongs to a run with other settings."""


class TrainingFailed(RuntimeError):
    """The workers failed more often than allowed."""


@dataclass(frozen=True)
class Resources:
    """Where a run trains, and what it keeps while it does."""

    num_workers: int = 1
    """Training workers: one per GPU, or processes on CPU."""
    use_gpu: bool = False
    """Give each worker a GPU."""
    cpus_per_worker: float = 1
    """Logical CPUs that Ray reserves for each worker."""
    checkpoint_every_steps: int = 0
    """Also keep a checkpoint every so many steps within an epoch; 0: at the end of each epoch only."""
    checkpoints_to_keep: int = 2
    """Best checkpoints kept, beside the latest."""
    max_failures: int = 3
    """Lost workers or nodes from which the run recovers by itself."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "checkpoints_to_keep"):
            at_least(name, getattr(self, name), 1)
        for name in ("checkpoint_every_steps", "max_failures"):
            at_least(name, getattr(self, name), 0)


@dataclass(frozen=True)
class Prepared:
    """Decoded splits and what was found on the way."""

    train: Any
    validation: Any
    test: Any
    train_rows: npt.NDArray[np.int64]
    validation_rows: npt.NDArray[np.int64]
    test_rows: npt.NDArray[np.int64]
    mode: str
    stored_spec: ImageSpec
    broken: list[dict[str, str]]
    duplicates: dict[str, int]
    """Images removed because their bytes are in another split too, by the split they left."""


@dataclass(frozen=True)
class Run:
    """What a finished run is, as `run.json` says it."""

    uri: str
    content: Mapping[str, Any]

    @property
    def test_metrics(self) -> dict[str, float]:
        return dict(self.content["test"])


def with_gpus(resources: Resources, wanted: bool | None) -> Resources:
    """The resources with GPUs as asked for, or when unsaid if the cluster has one for each worker.

    Raises:
        ValueError: GPUs are asked for and there are too few.
    """
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    if wanted and gpus < resources.num_workers:
        raise ValueError(
            f"{resources.num_workers} workers want a GPU each and the cluster has {gpus}; "
            "lower --num-workers or leave --use-gpu out"
        )
    use_gpu = gpus >= resources.num_workers if wanted is None else wanted
    return replace(resources, use_gpu=use_gpu)


Listener = Callable[[dict[str, Any]], None]


def planned(recipe: Recipe, data: LabelledData, resources: Resources) -> tuple[Recipe, ImageSpec]:
    """The resolved recipe and the pixels its model takes; everything that can be refused before Ray starts.

    Raises:
        ValueError: the model cannot be built, or the batch cannot be divided among the workers.
    """
    recipe = recipe.resolved(multi_label=data.multi_label)
    recipe.micro_batch(resources.num_workers)
    model = vit.build(recipe, vit.Classes(data.classes, data.multi_label))
    return recipe, vit.image_spec(model, recipe.model)


def finished(output: str, recipe: Recipe, data: LabelledData) -> Run | None:
    """The run that is already complete in the folder, if there is one.

    Raises:
        RunMismatch: the folder holds a run, finished or not, of another recipe or dataset.
    """
    folder = storage.open_storage(output)
    if not folder.exists(RECIPE):
        return None
    expected = identity(recipe, data)
    before = json.loads(folder.read(RECIPE))
    different = [key for key in expected if before.get(key) != expected[key]]
    if different:
        key = different[0]
        raise RunMismatch(
            f"{output} holds a run with another {key} ({difference(before.get(key), expected[key])}); "
            "give another --output, or the same settings to continue it"
        )
    return Run(output, json.loads(folder.read(MARKER))) if folder.exists(MARKER) else None


def identity(recipe: Recipe, data: LabelledData) -> dict[str, Any]:
    """What makes two runs the same run."""
    return {
        "recipe": asdict(recipe),
        "dataset": data.source,
        "taxonomy": data.taxonomy.name,
        "classes": list(data.classes),
        "images": {
            split: len(data.indices(split)) for split in (splits.TRAIN, splits.VALIDATION, splits.TEST)
        },
    }


def difference(before: Any, now: Any) -> str:
    """The first setting in which two nested values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in now:
            if before.get(key) != now[key]:
                inner = difference(before.get(key), now[key])
                return f"{key}{'.' if isinstance(now[key], dict) else ' '}{inner}"
    return f"was {before!r}, now {now!r}"


def fit(
    data: LabelledData,
    recipe: Recipe,
    *,
    output: str,
    resources: Resources,
    how: Ingest | None = None,
    listen: Listener | None = None,
) -> Run:
    """Train, pick, measure, describe. `recipe` is resolved (`planned`), Ray is running.

    Raises:
        IngestError: too many images cannot be used.
        TrainingFailed: more failures than `resources.max_failures`.
    """
    started = time.time()
    classes = vit.Classes(data.classes, data.multi_label)
    spec = vit.image_spec(vit.build(recipe, classes), recipe.model)
    folder = storage.open_storage(output)
    folder.put(RECIPE, as_json(identity(recipe, data)))
    prepared = prepare(data, spec, how or Ingest(), recipe)
    sidecar = Sidecar(data.taxonomy_reference, data.classes, spec, data.multi_label)
    task, result = train(data, prepared, sidecar, recipe, output=output, resources=resources, listen=listen)
    files, best_metrics = best_model(result)
    trained_s = time.time() - started
    report = measure(data, prepared, sidecar, files, resources=resources, recipe=recipe, output=output)
    sidecar = report.sidecar
    for name, payload in {**files, checkpoints.SIDECAR: sidecar.to_json().encode()}.items():
        folder.put(f"{BEST}/{name}", payload)
    content = {
        **identity(recipe, data),
        "image_spec": asdict(spec),
        "multi_label": data.multi_label,
        "best": best_metrics,
        "temperature": sidecar.temperature,
        "validation": dict(report.validation.overall),
        "test": dict(report.test.overall) if report.test else {},
        "data": account(data, prepared),
        "resources": asdict(resources),
        "ingest": prepared.mode,
        "train_seconds": trained_s,
        "seconds": time.time() - started,
        "images_per_s": best_metrics.get("images_per_s"),
        "git_revision": git_revision(),
        "versions": {name: version(name) for name in LIBRARIES},
    }
    folder.put(MARKER, as_json(content))
    return Run(output, content)


def prepare(data: LabelledData, spec: ImageSpec, how: Ingest, recipe: Recipe) -> Prepared:
    """Decode every split, account for what cannot be used, and choose how training images are kept."""
    limits = DecodeLimits()
    rows = {name: data.indices(name) for name in (splits.TRAIN, splits.VALIDATION, splits.TEST)}
    stored = ingest.enlarged(spec, how.margin)
    n_bytes = len(rows[splits.TRAIN]) * stored.height * stored.width * 3
    mode = ingest.mode_for(how, n_bytes, ingest.room(how))
    log.info(
        "%d training images decode to %.2f GB at %dx%d: kept in %s",
        len(rows[splits.TRAIN]), n_bytes / 1e9, stored.width, stored.height,
        {"memory": "the object store", "disk": "the object store, spilled to disk", "stream": "no place"}[mode],
    )  # fmt: skip
    order = rows[splits.TRAIN]
    if mode != "memory":  # a stream is shuffled within a window only, so it starts from a random order
        order = np.random.default_rng(recipe.seed).permutation(order)
    train = ingest.decoded(data.rows, order, stored, ingest=how, limits=limits)
    train = train if mode == "stream" else train.materialize()
    evaluated = {
        name: ingest.decoded(data.rows, rows[name], spec, ingest=how, limits=limits).materialize()
        for name in (splits.VALIDATION, splits.TEST)
    }
    outcome = pa.concat_tables(
        [ingest.outcomes(dataset) for dataset in (train, *evaluated.values())]
    ).sort_by("row_id")
    broken = ingest.broken(outcome, data.rows["uri"].to_pylist(), max_share=how.max_broken_share)
    usable = np.array([status == "ok" for status in outcome["status"].to_pylist()])
    repeated = splits.duplicates_to_drop(outcome["sha256"].to_pylist(), data.splits)
    for image in broken[:20]:
        log.warning("left out %s: %s %s", image["uri"], image["status"], image["error"])
    keep = usable & ~repeated
    return Prepared(
        train=train,
        validation=evaluated[splits.VALIDATION],
        test=evaluated[splits.TEST],
        train_rows=rows[splits.TRAIN][keep[rows[splits.TRAIN]]],
        validation_rows=rows[splits.VALIDATION][keep[rows[splits.VALIDATION]]],
        test_rows=rows[splits.TEST][keep[rows[splits.TEST]]],
        mode=mode,
        stored_spec=stored,
        broken=broken,
        duplicates={name: int(repeated[rows[name]].sum()) for name in rows if repeated[rows[name]].any()},
    )


def train(
    data: LabelledData,
    prepared: Prepared,
    sidecar: Sidecar,
    recipe: Recipe,
    *,
    output: str,
    resources: Resources,
    listen: Listener | None = None,
    callbacks: tuple[Any, ...] = (),
) -> tuple[Task, Any]:
    """Run the workers to the end of the recipe; returns Ray Train's result."""
    from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    targets = data.targets()
    counts = class_counts(targets[prepared.train_rows], len(data.classes))
    strata = stratum(targets, prepared.train_rows, counts)
    streams = prepared.mode != "memory"
    trains, epoch_images = prepared.train, images_per_pass(strata, recipe.balance)
    if streams:
        times = np.zeros(data.rows.num_rows, np.int64)
        drawn = one_pass(strata, recipe.balance, np.random.default_rng(recipe.seed))
        np.add.at(times, prepared.train_rows[drawn], 1)
        trains = trains.map_batches(
            ingest.repeated, batch_size=None, batch_format="pyarrow", fn_kwargs={"times": times}
        )
        epoch_images -= epoch_images % resources.num_workers
    with Messages(listen) as queue:
        task = Task(
            recipe=recipe,
            classes=vit.Classes(data.classes, data.multi_label),
            sidecar=sidecar,
            stored_spec=prepared.stored_spec,
            train_rows=prepared.train_rows,
            strata=strata,
            validation_rows=prepared.validation_rows,
            class_counts=counts,
            streams=streams,
            epoch_images=epoch_images * (recipe.augment.views or 1),
            run_uri=output,
            checkpoint_every_steps=resources.checkpoint_every_steps,
            progress=queue,
        )
        filesystem, path = storage.open_storage(output).filesystem_and_path()
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"task": task},
            datasets={"train": trains, "validation": prepared.validation},
            dataset_config=DataConfig(datasets_to_split=["train"] if streams else []),
            scaling_config=ScalingConfig(
                num_workers=resources.num_workers,
                use_gpu=resources.use_gpu,
                resources_per_worker={
                    "CPU": resources.cpus_per_worker,
                    **({"GPU": 1} if resources.use_gpu else {}),
                },
            ),
            run_config=RunConfig(
                name="checkpoints",
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=resources.max_failures),
                checkpoint_config=CheckpointConfig(
                    num_to_keep=resources.checkpoints_to_keep,
                    checkpoint_score_attribute="score",
                    checkpoint_score_order="max",
                ),
                callbacks=list(callbacks),
            ),
        )
        result = trainer.fit()
    if result.error is not None:
        raise TrainingFailed(f"training failed: {result.error}")
    return task, result


def class_counts(targets: npt.NDArray[Any], n_classes: int) -> npt.NDArray[np.int64]:
    if targets.ndim == 2:
        return np.asarray(targets.sum(axis=0, dtype=np.int64))
    return np.bincount(targets, minlength=n_classes)


def stratum(
    targets: npt.NDArray[Any], rows: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """The class that sampling goes by: the label, or the rarest of several; none is a class of its own."""
    chosen = targets[rows]
    if chosen.ndim == 1:
        return np.asarray(chosen, np.int64)
    rarity = np.where(chosen > 0, counts[None, :], np.iinfo(np.int64).max)
    return np.where(chosen.any(axis=1), rarity.argmin(axis=1), chosen.shape[1])


class Messages:
    """A queue that workers fill and a thread of the driver empties into `listen`."""

    def __init__(self, listen: Listener | None) -> None:
        self.listen = listen
        self.over = threading.Event()
        self.queue: Any = None

    def __enter__(self) -> Any:
        if self.listen is None:
            return None
        from ray.util.queue import Queue

        self.queue = Queue(actor_options={"num_cpus": 0})
        self.thread = threading.Thread(target=self.relay, daemon=True)
        self.thread.start()
        return self.queue

    def __exit__(self, *_: object) -> None:
        if self.queue is not None:
            self.over.set()
            self.thread.join()
            self.queue.shutdown(force=True)

    def relay(self) -> None:
        while not self.over.wait(PROGRESS_POLL_S):
            for message in self.queue.get_nowait_batch(self.queue.qsize()):
                self.listen(message)  # type: ignore[misc]


def best_model(result: Any) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Files of the best checkpoint's model, and its metrics."""
    checkpoint, line = max(result.best_checkpoints, key=lambda pair: pair[1]["score"])
    with checkpoint.as_directory() as folder:
        model = Path(folder, checkpoints.MODEL_FOLDER)
        return {file.name: file.read_bytes() for file in sorted(model.iterdir())}, dict(line)


@dataclass(frozen=True)
class Measured:
    """What the best model is worth, and the sidecar with its temperature and thresholds."""

    sidecar: Sidecar
    validation: Evaluation
    test: Evaluation | None


def measure(
    data: LabelledData,
    prepared: Prepared,
    sidecar: Sidecar,
    files: Mapping[str, bytes],
    *,
    resources: Resources,
    recipe: Recipe,
    output: str,
) -> Measured:
    """Calibrate on validation, evaluate on validation and test, and write both evaluations."""
    targets = data.targets()
    scores = {
        name: score(dataset, rows, files, sidecar, workers=resources.num_workers, use_gpu=resources.use_gpu)
        for name, dataset, rows in (
            (splits.VALIDATION, prepared.validation, prepared.validation_rows),
            (splits.TEST, prepared.test, prepared.test_rows),
        )
        if len(rows)
    }
    truth = targets[prepared.validation_rows]
    temperature = calibration.fit_temperature(scores[splits.VALIDATION], truth)
    probabilities_nc = metrics.probabilities(
        scores[splits.VALIDATION], temperature=temperature, multi_label=data.multi_label
    )
    thresholds = calibration.fit_thresholds(probabilities_nc, truth, data.taxonomy.rollup(data.classes))
    sidecar = replace(sidecar, temperature=temperature, thresholds=thresholds)
    found = {}
    for name, rows in ((splits.VALIDATION, prepared.validation_rows), (splits.TEST, prepared.test_rows)):
        if name in scores:
            found[name] = evaluated(data, sidecar, scores[name], targets[rows], split=name, recipe=recipe)
    final = found.get(splits.TEST, found[splits.VALIDATION])
    storage.open_storage(output).put(f"{REPORT}/evaluation.json", final.to_json().encode())
    return Measured(sidecar, found[splits.VALIDATION], found.get(splits.TEST))


def evaluated(
    data: LabelledData,
    sidecar: Sidecar,
    logits_nc: npt.NDArray[np.float32],
    targets: npt.NDArray[Any],
    *,
    split: str,
    recipe: Recipe,
) -> Evaluation:
    probabilities_nc = metrics.probabilities(
        logits_nc, temperature=sidecar.temperature, multi_label=sidecar.multi_label
    )
    return evaluation.evaluate(
        Scored(sidecar.class_ids, logits_nc, probabilities_nc, targets),
        data.taxonomy,
        thresholds=sidecar.thresholds,
        about={"model": recipe.model, "dataset": data.source, "split": split, "taxonomy": data.taxonomy.name},
    )


def account(data: LabelledData, prepared: Prepared) -> dict[str, Any]:
    """Where every image of the dataset went."""
    return {
        "images": {
            splits.TRAIN: len(prepared.train_rows),
            splits.VALIDATION: len(prepared.validation_rows),
            splits.TEST: len(prepared.test_rows),
        },
        "broken": prepared.broken,
        "duplicates_removed": prepared.duplicates,
        "dropped": data.dropped,
        "class_counts": dict(zip(data.classes, data.class_counts(splits.TRAIN).tolist(), strict=True)),
    }


def as_json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, default=str) + "\n").encode()


def git_revision() -> str | None:
    """Revision of the code that runs, when it runs from a checkout."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],  # noqa: S607 (whatever git the user has)
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
