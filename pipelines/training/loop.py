"""The loop of one Ray Train worker: batches in, checkpoints and metrics out.

Every worker runs this same code on its share of each global batch. All randomness is a function of the
seed, the epoch and the step, so a run continues from any checkpoint as if it had not stopped, and two
workers see the images that one would.
"""

import contextlib
import gc
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.datasets import pixels as decoded_pixels
from pipelines.datasets.normalize import standardize
from pipelines.datasets.pixels import PixelStore
from pipelines.images.prepare import Pixels
from pipelines.messages import InputError
from pipelines.training import augment, checkpoints, layers
from pipelines.training.batches import Batches, MicroBatch, Targets
from pipelines.training.decoded import images_per_pass
from pipelines.training.losses import build_criterion
from pipelines.training.model import build
from pipelines.training.optimizer import Learner, autocast, choose_precision
from pipelines.training.resources import threads_of
from pipelines.training.task import Progress, Task, Worker, step_seed, validation_name
from pipelines.training.tracking import Tracker
from pipelines.training.validation import gather, validate

MID_EPOCH_SCORE = -1e30
"""Score of a checkpoint between two evaluations: never the best, but a number, as Ray's ranking requires."""
PROGRESS_EVERY_S = 1.0
LOWER_IS_BETTER = frozenset({"validation_loss", "log_loss", "ece"})


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
    training: Any = ray.train.get_dataset_shard("train")
    validation: Any = ray.train.get_dataset_shard(validation_name(worker.rank))
    if not task.streams:
        n_classes = len(task.classes.ids)
        training = PixelStore(training, task.stored_spec, n_classes)
        validation = PixelStore(validation, task.model_spec.image_spec, n_classes)
    trainer = Trainer(task, worker, Batches(task, worker, training, validation))
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            trainer.restore(checkpoints.load_state(Path(folder), worker.device))
    trainer.run()


class Trainer:
    """One worker's model and the loop over its batches."""

    def __init__(self, task: Task, worker: Worker, batches: Batches) -> None:
        self.task, self.worker, self.batches, self.recipe = task, worker, batches, task.recipe
        self.model = build(task.recipe, task.classes).to(worker.device)
        self.unused = layers.find_unused_parameters(self.model, task.model_spec.image_spec)
        self.precision = choose_precision(self.recipe.precision, worker.device)
        total_steps = self.recipe.epochs * task.steps_per_epoch
        self.learner = Learner(
            self.model, self.recipe.optimizer, total_steps=total_steps, precision=self.precision
        )
        self.criterion = build_criterion(
            self.recipe.loss,
            self.recipe.class_balance,
            task.class_counts,
            images_per_pass(task.strata, self.recipe.class_balance),
            multi_label=task.classes.multi_label,
        )
        self.progress = Progress()
        self.parallel: Any = None
        self.tracker = (
            Tracker(task.run_uri, task.trackers, asdict(task.recipe))
            if worker.is_main and task.run_uri
            else None
        )

    def run(self) -> None:
        """Every epoch that is left: train, evaluate, report, perhaps stop."""
        while self.progress.epoch < self.recipe.epochs and not self.should_stop():
            started, first = time.perf_counter(), self.progress.step
            self.train_epoch()
            images = (self.task.steps_per_epoch - first) * self.recipe.batch_size
            self.finish_epoch(images_per_s=images / (time.perf_counter() - started))

    def should_stop(self) -> bool:
        """Whether early stopping has run out of patience."""
        patience = self.recipe.early_stopping.patience_epochs
        return bool(patience) and self.progress.stale_epochs >= patience

    def train_epoch(self) -> None:
        """Every step that is left of this epoch."""
        epoch, n_steps, first = self.progress.epoch, self.task.steps_per_epoch, self.progress.step
        changed = layers.freeze(self.model, self.recipe.finetune, epoch, unused=self.unused)
        if changed or self.parallel is None:
            self.wrap()
        layers.set_training(self.model)
        self.batches.tally = decoded_pixels.Tally()
        shown = started = time.perf_counter()
        for step, micro_batches in self.batches.iter_steps(epoch, first):
            self.progress.loss_sum += self.train_step(micro_batches, epoch=epoch, step=step)
            self.progress.step = step + 1
            if time.perf_counter() - shown > PROGRESS_EVERY_S:
                shown = time.perf_counter()
                self.send_progress(
                    images_per_s=(step + 1 - first) * self.recipe.batch_size / (shown - started)
                )
            every = self.task.checkpoint_every_steps
            if every and (step + 1) % every == 0 and step + 1 < n_steps:
                self.report({"score": MID_EPOCH_SCORE, "epoch": epoch, "step": step + 1})

    def wrap(self) -> None:
        """The model as it is trained: compiled if asked for, its gradients averaged over the workers.

        Repeated when the set of trained weights changes: DistributedDataParallel fixes it when constructed.
        """
        self.parallel = None
        gc.collect()
        model = torch.compile(self.model) if self.recipe.finetune.compile else self.model
        if self.worker.world_size > 1:
            ids = [self.worker.device.index] if self.worker.device.type == "cuda" else None
            model = torch.nn.parallel.DistributedDataParallel(
                model, device_ids=ids, gradient_as_bucket_view=True
            )
        self.parallel = model

    def train_step(self, micro_batches: Sequence[MicroBatch], *, epoch: int, step: int) -> float:
        """One optimizer step over the global batch; returns this worker's mean loss."""
        loss = self.accumulate(micro_batches, seed=step_seed(self.recipe.seed, epoch, step))
        if not np.isfinite(loss):
            raise Diverged(
                f"the loss is {loss} at epoch {epoch + 1}, step {step + 1}; "
                "lower --optimizer.learning-rate, or use --precision fp32"
            )
        self.learner.step()
        return loss

    def accumulate(self, micro_batches: Sequence[MicroBatch], *, seed: int) -> float:
        """Gradients of the mean loss over the global batch; micro-batches and workers weigh the same."""
        draws = augment.draw(self.recipe.augment, self.recipe.batch_size, torch.Generator().manual_seed(seed))
        torch.manual_seed(seed + self.worker.rank)
        total, parts = 0.0, len(micro_batches)
        for part, (pixels, targets) in enumerate(micro_batches):
            first = (self.worker.rank * parts + part) * len(pixels)
            images, targets_nc = self.augment(pixels, targets, draws.slice(first, first + len(pixels)))
            with self.without_sync() if part < parts - 1 else contextlib.nullcontext():
                with autocast(self.worker.device, self.precision):
                    logits = self.parallel(pixel_values=images).logits
                loss = self.criterion(logits, targets_nc).mean() / parts
                self.learner.scaler.scale(loss).backward()
            total += float(loss.detach())
        return total

    def augment(self, pixels: Pixels, targets: Targets, draws: augment.Draws) -> tuple[Tensor, Tensor]:
        """Augmented, standardised images and the targets that belong to them, on the device."""
        spec, device = self.task.model_spec.image_spec, self.worker.device
        size = {"height": spec.height, "width": spec.width}
        images = augment.apply(torch.from_numpy(pixels).to(device), draws, **size)
        mixed = augment.mix_targets(torch.from_numpy(targets).to(device), draws, **size)
        return standardize(images, spec), mixed

    def without_sync(self) -> Any:
        """Keep gradients local: only the last micro-batch of a step averages them over the workers."""
        return self.parallel.no_sync() if hasattr(self.parallel, "no_sync") else contextlib.nullcontext()

    def finish_epoch(self, *, images_per_s: float) -> None:
        """Evaluate, keep the better of the model's own and its averaged weights, report."""
        model, measured = self.evaluate_best()
        progress, score = self.progress, self.score(measured)
        n_steps = self.task.steps_per_epoch
        line = {
            "epoch": progress.epoch + 1,
            "step": (progress.epoch + 1) * n_steps,
            "loss": float(gather(np.array([progress.loss_sum]), self.worker).mean()) / n_steps,
            "learning_rate": self.learner.learning_rate,
            "images_per_s": images_per_s,
            "averaged_weights": model is not self.model,
            **self.count_unreadable(),
            **measured,
        }
        better = score > progress.best_score + self.recipe.early_stopping.min_delta
        self.progress = Progress(
            epoch=progress.epoch + 1,
            best_score=score if better else progress.best_score,
            stale_epochs=0 if better else progress.stale_epochs + 1,
            history=(*progress.history, line),
        )
        if self.tracker:
            self.tracker.write(self.progress.history)
        self.report({**line, "score": score}, model=model)
        self.send_progress(images_per_s=images_per_s)

    def evaluate_best(self) -> tuple[Any, dict[str, float]]:
        """The better of the model and its averaged twin, and its validation metrics."""
        measured = self.evaluate(self.model)
        if self.learner.ema:
            averaged = self.evaluate(self.learner.ema.module)
            if self.score(averaged) >= self.score(measured):
                return self.learner.ema.module, averaged
        return self.model, measured

    def evaluate(self, model: Any) -> dict[str, float]:
        """Validation metrics of these weights, the same on every worker."""
        batches = self.batches.iter_validation()
        return validate(
            model, batches, self.task, self.worker, criterion=self.criterion, precision=self.precision
        )

    def count_unreadable(self) -> dict[str, int]:
        """How many images of this epoch's streams could not be read, over all workers.

        Raises:
            JobFailed: they are more than the task allows.
        """
        if not self.task.streams:
            return {}
        tally = self.batches.tally
        unreadable, images = map(
            int, gather(np.array([[tally.unreadable, tally.images]]), self.worker).sum(axis=0)
        )
        decoded_pixels.refuse_too_many(
            unreadable,
            images,
            max_fraction=self.task.max_unreadable_fraction,
            examples="readable before this epoch",
        )
        return {"unreadable_images": unreadable}

    def score(self, measured: dict[str, float]) -> float:
        """The metric that selects, larger being better.

        Raises:
            InputError: images that cannot be read have taken too many classes from validation.
        """
        name = self.recipe.metric_for_best_model
        if name not in measured:
            raise InputError(
                f"metric_for_best_model is {name}, but the readable validation images hold too few classes; "
                "repair the others, or choose another metric"
            )
        return -measured[name] if name in LOWER_IS_BETTER else measured[name]

    def report(self, line: dict[str, Any], *, model: Any = None) -> None:
        """Hand metrics and a checkpoint to Ray; a barrier over all workers."""
        if self.worker.is_main:
            checkpoints.report(line, self.state(), model=model, model_spec=self.task.model_spec)
        else:
            checkpoints.report_metrics(line)

    def state(self) -> dict[str, Any]:
        """All that a continuation needs; no random state: a step's seed follows from its number."""
        progress = asdict(self.progress)
        return {
            **self.learner.state_dict(),
            "progress": {**progress, "history": json.dumps(progress["history"])},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the state of a checkpoint."""
        self.learner.load_state_dict(state)
        progress = state["progress"]
        self.progress = Progress(**{**progress, "history": tuple(json.loads(progress["history"]))})

    def send_progress(self, *, images_per_s: float) -> None:
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
            "metric": last.get(self.recipe.metric_for_best_model),
            "images_per_s": images_per_s,
        }
        self.task.progress_queue.put_nowait(message)
