"""The loop of one Ray Train worker: batches in, checkpoints and metrics out.

Every worker runs this same code on its share of each global batch. All randomness is a function of the
seed, the epoch and the step, so a run continues from any checkpoint as if it had not stopped, and two
workers see the images that one would.
"""

import contextlib
import gc
import itertools
import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed

from pipelines.datasets import pixels as ingest
from pipelines.datasets.normalize import normalize, standardize
from pipelines.datasets.pixels import Pixels, PixelStore
from pipelines.evaluation import metrics
from pipelines.training import augment, checkpoints, layers
from pipelines.training import model as vit
from pipelines.training import optimizer as optimisation
from pipelines.training.checkpoints import STATE_FILE
from pipelines.training.decoded import epoch_order, images_per_pass
from pipelines.training.losses import criterion
from pipelines.training.resources import threads_of
from pipelines.training.task import Progress, Task, Worker, step_seed, validation_name
from pipelines.training.tracking import Tracker

MID_EPOCH_SCORE = -1e30
"""Score of a checkpoint between two evaluations: never the best, but a number, as Ray's ranking wants."""
EVALUATION_BATCH = 256
PROGRESS_EVERY_S = 1.0
LOWER_IS_BETTER = frozenset({"validation_loss", "log_loss", "ece"})

Targets = npt.NDArray[np.float32]
MicroBatch = tuple[Pixels, Targets]


class Diverged(RuntimeError):
    """The loss is no longer a number."""


def train_worker(config: dict[str, Any]) -> None:
    """What Ray Train calls on every worker; `config` holds one `Task`."""
    import ray.train
    from ray.train.torch import get_device

    task: Task = config["task"]
    context = ray.train.get_context()
    worker = Worker(context.get_world_rank(), context.get_world_size(), get_device())
    if worker.device.type == "cpu":
        torch.set_num_threads(threads_of(context.get_local_world_size() * task.runs_at_once))
    trains: Any = ray.train.get_dataset_shard("train")
    validation: Any = ray.train.get_dataset_shard(validation_name(worker.rank))
    if not task.streams:
        n_classes = len(task.classes.ids)
        trains = PixelStore(trains, task.stored_spec, n_classes)
        validation = PixelStore(validation, task.sidecar.image_spec, n_classes)
    trainer = Trainer(task, worker, trains, validation)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            trainer.restore(checkpoints.parse_state(Path(folder, STATE_FILE).read_bytes(), worker.device))
    trainer.run()


class Trainer:
    """One worker's model, optimiser and pixels, and the loop over them.

    Pixels come from a `PixelStore`, or from an iterator over this worker's shard when the task streams.
    """

    def __init__(self, task: Task, worker: Worker, trains: Any, validation: Any) -> None:
        self.task, self.worker, self.recipe = task, worker, task.recipe
        self.trains, self.validation = trains, validation
        self.model = vit.build(task.recipe, task.classes).to(worker.device)
        self.unused = layers.find_unused_parameters(self.model, task.sidecar.image_spec)
        optimizer = self.recipe.optimizer
        self.adam = optimisation.adamw(layers.parameter_groups(self.model, optimizer), optimizer)
        self.averaged = (
            optimisation.Averaged(self.model, optimizer.ema_decay) if optimizer.ema_decay else None
        )
        self.precision = optimisation.chosen_precision(self.recipe.precision, worker.device)
        self.scaler = torch.amp.GradScaler(worker.device.type, enabled=self.precision == "fp16")
        self.criterion = criterion(
            self.recipe.loss,
            self.recipe.balance,
            task.class_counts,
            images_per_pass(task.strata, self.recipe.balance),
            multi_label=task.classes.multi_label,
        )
        self.progress = Progress()
        self.tally = ingest.Tally()
        self.parallel: Any = None
        self.tracker = (
            Tracker(task.run_uri, task.trackers, asdict(task.recipe))
            if worker.is_main and task.run_uri
            else None
        )

    def run(self) -> None:
        """Every epoch that is left: train, evaluate, report, perhaps stop."""
        while self.progress.epoch < self.recipe.epochs and not self.is_stale():
            started, first = time.perf_counter(), self.progress.step
            self.train_epoch()
            images = (self.task.steps_per_epoch - first) * self.recipe.batch_size
            self.finish_epoch(images_per_s=images / (time.perf_counter() - started))

    def is_stale(self) -> bool:
        patience = self.recipe.stopping.patience_epochs
        return bool(patience) and self.progress.stale_epochs >= patience

    def train_epoch(self) -> None:
        """Every step that is left of this epoch."""
        epoch, n_steps, first = self.progress.epoch, self.task.steps_per_epoch, self.progress.step
        changed = layers.freeze(self.model, self.recipe.network, epoch, unused=self.unused)
        if changed or self.parallel is None:
            self.wrap()
        layers.set_training(self.model)
        self.tally = ingest.Tally()
        told = started = time.perf_counter()
        for step, micro_batches in self.iter_steps(epoch, first):
            self.progress.loss_sum += self.train_step(micro_batches, epoch=epoch, step=step)
            self.progress.step = step + 1
            if time.perf_counter() - told > PROGRESS_EVERY_S:
                told = time.perf_counter()
                self.tell(images_per_s=(step + 1 - first) * self.recipe.batch_size / (told - started))
            every = self.task.checkpoint_every_steps
            if every and (step + 1) % every == 0 and step + 1 < n_steps:
                self.report({"score": MID_EPOCH_SCORE, "epoch": epoch, "step": step + 1}, with_model=False)

    def wrap(self) -> None:
        """The model as it is trained: compiled if asked for, its gradients averaged over the workers.

        Done again when other weights learn: DistributedDataParallel counts on those of its construction.
        """
        self.parallel = None
        gc.collect()
        model = torch.compile(self.model) if self.recipe.network.compile else self.model
        if self.worker.world_size > 1:
            ids = [self.worker.device.index] if self.worker.device.type == "cuda" else None
            model = torch.nn.parallel.DistributedDataParallel(
                model, device_ids=ids, gradient_as_bucket_view=True
            )
        self.parallel = model

    def train_step(self, micro_batches: Sequence[MicroBatch], *, epoch: int, step: int) -> float:
        """One optimiser step over the global batch; returns this worker's mean loss."""
        done, total = epoch * self.task.steps_per_epoch + step, self.recipe.epochs * self.task.steps_per_epoch
        share = optimisation.learning_rate_share(self.recipe.optimizer, done, total)
        optimisation.set_learning_rate(self.adam, self.recipe.optimizer.peak * share)
        loss = self.accumulate(micro_batches, seed=step_seed(self.recipe.seed, epoch, step))
        if not np.isfinite(loss):
            raise Diverged(
                f"the loss is {loss} at epoch {epoch + 1}, step {step + 1}; "
                "lower --optimizer.learning-rate, or use --precision fp32"
            )
        self.scaler.unscale_(self.adam)
        if self.recipe.optimizer.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip_norm)
        self.scaler.step(self.adam)
        self.scaler.update()
        self.adam.zero_grad(set_to_none=True)
        if self.averaged:
            self.averaged.update(self.model)
        return loss

    def accumulate(self, micro_batches: Sequence[MicroBatch], *, seed: int) -> float:
        """Gradients of the mean loss over the global batch; micro-batches and workers weigh the same."""
        draws = augment.draw(self.recipe.augment, self.recipe.batch_size, torch.Generator().manual_seed(seed))
        torch.manual_seed(seed + self.worker.rank)
        total, parts = 0.0, len(micro_batches)
        for part, (pixels, targets) in enumerate(micro_batches):
            first = (self.worker.rank * parts + part) * len(pixels)
            images, targets_nc = self.augmented(pixels, targets, draws.slice(first, first + len(pixels)))
            with self.unsynchronised() if part < parts - 1 else contextlib.nullcontext():
                with optimisation.autocast(self.worker.device, self.precision):
                    logits = self.parallel(pixel_values=images).logits
                loss = self.criterion(logits, targets_nc).mean() / parts
                self.scaler.scale(loss).backward()
            total += float(loss.detach())
        return total

    def augmented(self, pixels: Pixels, targets: Targets, draws: augment.Draws) -> tuple[Tensor, Tensor]:
        """Normalised float images and the targets that belong to them, on the device."""
        spec, device = self.task.sidecar.image_spec, self.worker.device
        size = {"height": spec.height, "width": spec.width}
        images = augment.apply(torch.from_numpy(pixels).to(device), draws, **size)
        return standardize(images, spec), augment.mix_targets(
            torch.from_numpy(targets).to(device), draws, **size
        )

    def unsynchronised(self) -> Any:
        """Keep gradients local: only the last micro-batch of a step averages them over the workers."""
        return self.parallel.no_sync() if hasattr(self.parallel, "no_sync") else contextlib.nullcontext()

    def iter_steps(self, epoch: int, first: int) -> Iterator[tuple[int, list[MicroBatch]]]:
        """This worker's micro-batches of each step from `first` on."""
        parts = self.recipe.optimizer.accumulation
        source = self.iter_stream(epoch) if self.task.streams else self.iter_random(epoch, first)
        for _ in range(first * parts if self.task.streams else 0):
            next(source)
        for step in range(first, self.task.steps_per_epoch):
            yield step, [next(source) for _ in range(parts)]

    def iter_random(self, epoch: int, first: int) -> Iterator[MicroBatch]:
        """Micro-batches by row, in the order that the seed gives this epoch."""
        recipe, n_steps = self.recipe, self.task.steps_per_epoch
        views = recipe.augment.views or 1
        order = epoch_order(self.task.strata, recipe.balance, views=views, seed=recipe.seed, epoch=epoch)
        order = np.resize(order, n_steps * recipe.batch_size)  # repeats images when they fill no batch
        rows = self.task.train_rows[order].reshape(
            n_steps, self.worker.world_size, recipe.optimizer.accumulation, -1
        )
        for step in range(first, n_steps):
            for part in rows[step, self.worker.rank]:
                yield self.trains.take(part)

    def iter_stream(self, epoch: int) -> Iterator[MicroBatch]:
        """Micro-batches of this worker's shard, pass after pass for as long as they are asked for."""
        size, n_classes = self.recipe.micro_batch(self.worker.world_size), len(self.task.classes.ids)
        for view in itertools.count():
            seed = step_seed(self.recipe.seed, epoch, view)
            yield from ingest.stream_batches(
                self.trains, self.task.stored_spec, n_classes, batch_size=size, seed=seed, tally=self.tally
            )

    def finish_epoch(self, *, images_per_s: float) -> None:
        """Evaluate, take the better of own and averaged weights, report."""
        measured, averaged = self.evaluate(), False
        if self.averaged:
            with self.weights(averaged=True):
                candidate = self.evaluate()
            averaged = self.score(candidate) >= self.score(measured)
            measured = candidate if averaged else measured
        progress, score = self.progress, self.score(measured)
        line = {
            "epoch": progress.epoch + 1,
            "step": (progress.epoch + 1) * self.task.steps_per_epoch,
            "loss": float(self.gathered(np.array([progress.loss_sum])).mean()) / self.task.steps_per_epoch,
            "learning_rate": max(group["lr"] / group["scale"] for group in self.adam.param_groups),
            "images_per_s": images_per_s,
            "averaged_weights": averaged,
            **self.broken_images(),
            **measured,
        }
        better = score > progress.best_score + self.recipe.stopping.min_gain
        self.progress = Progress(
            epoch=progress.epoch + 1,
            best_score=score if better else progress.best_score,
            stale_epochs=0 if better else progress.stale_epochs + 1,
            history=(*progress.history, line),
        )
        if self.tracker:
            self.tracker.write(self.progress.history)
        self.report({**line, "score": score}, with_model=True, averaged=averaged)
        self.tell(images_per_s=images_per_s)

    def broken_images(self) -> dict[str, int]:
        """How many images of this epoch's streams could not be read, over all workers.

        Raises:
            IngestError: they are more than the task allows.
        """
        if not self.task.streams:
            return {}
        mine = np.array([[self.tally.broken, self.tally.images]])
        broken, images = map(int, self.gathered(mine).sum(axis=0))
        ingest.refuse_too_many(
            broken, images, max_share=self.task.max_broken_share, examples="readable before this epoch"
        )
        return {"broken_images": broken}

    def score(self, measured: dict[str, float]) -> float:
        """The metric that selects, larger being better.

        Raises:
            ValueError: images that cannot be read have taken too many classes from validation.
        """
        name = self.recipe.select_by
        if name not in measured:
            raise ValueError(
                f"select_by is {name}, but the validation images that can be read hold too few classes; "
                "mend the others, or choose another metric"
            )
        return -measured[name] if name in LOWER_IS_BETTER else measured[name]

    def weights(self, *, averaged: bool) -> Any:
        """The model with its own or its averaged weights, for the duration."""
        return self.averaged.applied(self.model) if averaged and self.averaged else contextlib.nullcontext()

    def evaluate(self) -> dict[str, float]:
        """Validation metrics, the same on every worker."""
        logits, targets = self.logits(self.validation_batches())
        logits_nc, targets_nc = self.gathered(logits), self.gathered(targets)
        truth = targets_nc.astype(np.uint8) if self.task.classes.multi_label else targets_nc.argmax(1)
        loss = self.criterion(torch.from_numpy(logits_nc), torch.from_numpy(targets_nc)).mean()
        return {"validation_loss": float(loss), **metrics.classification(logits_nc, truth)}

    def validation_batches(self) -> Iterator[MicroBatch]:
        """This worker's share of the validation images."""
        rows, spec = self.task.validation_rows, self.task.sidecar.image_spec
        if self.task.streams:
            yield from ingest.evaluation_batches(
                self.validation,
                spec,
                len(self.task.classes.ids),
                batch_size=EVALUATION_BATCH,
                rows=rows,
                tally=self.tally,
            )
            return
        mine = rows[self.worker.rank :: self.worker.world_size]
        for start in range(0, len(mine), EVALUATION_BATCH):
            yield self.validation.take(mine[start : start + EVALUATION_BATCH])

    def logits(self, batches: Iterable[MicroBatch]) -> tuple[npt.NDArray[np.float32], Targets]:
        """Logits and targets of all images of these batches."""
        n_classes = len(self.task.classes.ids)
        found, wanted = [np.zeros((0, n_classes), np.float32)], [np.zeros((0, n_classes), np.float32)]
        self.model.eval()
        for pixels, targets_nc in batches:
            spec = self.task.sidecar.image_spec
            images = normalize(torch.from_numpy(pixels).to(self.worker.device), spec)
            with torch.inference_mode(), optimisation.autocast(self.worker.device, self.precision):
                logits = self.model(pixel_values=images).logits
            found.append(logits.float().cpu().numpy())
            wanted.append(targets_nc)
        layers.set_training(self.model)
        return np.concatenate(found), np.concatenate(wanted)

    def gathered(self, mine: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The rows of all workers."""
        if self.worker.world_size == 1:
            return mine
        parts: list[Any] = [None] * self.worker.world_size
        distributed.all_gather_object(parts, mine)
        return np.concatenate(parts)

    def report(self, line: dict[str, Any], *, with_model: bool, averaged: bool = False) -> None:
        """Hand metrics and a checkpoint to Ray; a barrier over all workers."""
        import ray.train

        if not self.worker.is_main:
            ray.train.report(line)
            return
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            checkpoints.save_state(folder, self.state())
            if with_model:
                with self.weights(averaged=averaged):
                    checkpoints.write_model(self.model, folder / checkpoints.MODEL_FOLDER, self.task.sidecar)
            checkpoints.write_report(folder, line)
            ray.train.report(line, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def state(self) -> dict[str, Any]:
        """All that a continuation needs; no random state, for that follows from the progress."""
        progress = asdict(self.progress)
        return {
            "model": self.model.state_dict(),
            "optimizer": self.adam.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged else None,
            "progress": {**progress, "history": json.dumps(progress["history"])},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the state of a checkpoint."""
        self.model.load_state_dict(state["model"])
        self.adam.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.averaged:
            self.averaged.load_state_dict(state["averaged"])
        progress = state["progress"]
        self.progress = Progress(**{**progress, "history": tuple(json.loads(progress["history"]))})

    def tell(self, *, images_per_s: float) -> None:
        """One progress message, if someone listens."""
        if not self.worker.is_main or self.task.progress_queue is None:
            return
        progress, n_steps = self.progress, self.task.steps_per_epoch
        last = progress.history[-1] if progress.history else {}
        message = {
            "done": progress.epoch * n_steps + progress.step,
            "total": self.recipe.epochs * n_steps,
            "epoch": progress.epoch if progress.step else len(progress.history) - 1,
            "loss": progress.loss_sum / progress.step if progress.step else last.get("loss"),
            "metric": last.get(self.recipe.select_by),
            "images_per_s": images_per_s,
        }
        self.task.progress_queue.put_nowait(message)
