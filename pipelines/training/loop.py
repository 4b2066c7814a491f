"""The loop of one Ray Train worker: batches in, checkpoints and metrics out.

Every worker runs this same code on its share of each global batch. All randomness is a function of the
seed, the epoch and the step, so a run continues from any checkpoint as if it had not stopped, and two
workers see the images that one would.
"""

import contextlib
import gc
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.datasets import pixels as decoded_pixels
from pipelines.datasets.normalize import standardize
from pipelines.datasets.pixels import PixelStore
from pipelines.images.prepare import Pixels
from pipelines.messages import InputError, JobFailed
from pipelines.training import augment, checkpoints, layers
from pipelines.training.batches import Batches, MicroBatch, Targets, prefetch
from pipelines.training.decoded import images_per_pass
from pipelines.training.losses import build_criterion
from pipelines.training.model import build
from pipelines.training.optimizer import Learner, autocast, choose_precision, fits_in_memory
from pipelines.training.resources import threads_of
from pipelines.training.task import Progress, Task, Worker, step_seed, validation_name
from pipelines.training.tracking import Tracker
from pipelines.training.validation import from_main, gather, validate

log = logging.getLogger(__name__)

MID_EPOCH_SCORE = -1e30
"""Score of a checkpoint between two evaluations: never the best, but a number, as Ray's ranking requires."""
PROGRESS_EVERY_S = 1.0
LOWER_IS_BETTER = frozenset({"validation_loss", "log_loss", "ece", "ece_classwise"})
"""Metrics of the validation images that are errors; all others grow with a better model."""


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


@dataclass
class _Pace:
    """Since when speed is measured, and what was spent waiting for images."""

    first_step: int
    started: float = field(default_factory=time.perf_counter)
    waited_s: float = 0.0


def _is_due(step: int, every: int) -> bool:
    """Whether something done every so many steps, 0 for never, is done after this one."""
    return bool(every) and step % every == 0


class Trainer:
    """One worker's model and the loop over its batches."""

    def __init__(self, task: Task, worker: Worker, batches: Batches) -> None:
        self.task, self.worker, self.batches, self.recipe = task, worker, batches, task.recipe
        self.model = build(task.recipe, task.classes).to(worker.device)
        self.unused = layers.find_unused_parameters(self.model, task.model_spec.image_spec)
        self.precision = choose_precision(self.recipe.precision, worker.device)
        self.learner = Learner(
            self.model, self.recipe.optimizer, total_steps=task.total_steps, precision=self.precision
        )
        self.criterion = build_criterion(
            self.recipe.loss,
            self.recipe.class_balance,
            task.class_counts,
            images_per_pass(task.strata, self.recipe.class_balance),
            multi_label=task.classes.multi_label,
        )
        self.progress, self.pace = Progress(), _Pace(0)
        self.began = time.perf_counter()
        self.gradient_norm: Any = 0.0
        self.parallel: Any = None
        self.pieces = 1
        self.tracker = (
            Tracker(task.run_uri, task.trackers, asdict(task.recipe))
            if worker.is_main and task.run_uri
            else None
        )

    def run(self) -> None:
        """Every epoch that is left: train, evaluate, report, perhaps stop."""
        while not self.is_over():
            self.train_epoch()
            history = self.progress.history
            if not history or history[-1]["step"] != self.steps_done:
                self.measure()

    def is_over(self) -> bool:
        """Whether all steps are done, the time is up, or early stopping has run out of patience."""
        return self.steps_done >= self.task.total_steps or self.is_out_of_time() or self.should_stop()

    def should_stop(self) -> bool:
        """Whether early stopping has run out of patience."""
        patience_steps = self.recipe.early_stopping.patience_epochs * self.task.steps_per_epoch
        return bool(patience_steps) and self.steps_done - self.progress.best_step >= patience_steps

    def is_out_of_time(self) -> bool:
        """Whether the run has taken its time, by the clock of the leading worker."""
        limit = self.recipe.max_time_s
        return bool(limit) and from_main(self.progress.seconds >= limit, self.worker)

    @property
    def steps_done(self) -> int:
        """Optimizer steps of the whole run so far."""
        return self.progress.epoch * self.task.steps_per_epoch + self.progress.step

    def train_epoch(self) -> None:
        """The steps that are left of this epoch, or of the run, with the evaluations between them."""
        epoch = self.progress.epoch
        changed = layers.freeze(self.model, self.recipe.finetune, epoch, unused=self.unused)
        if changed or self.parallel is None:
            self.wrap()
        layers.set_training(self.model)
        self.batches.tally = decoded_pixels.Tally()
        self.pace = _Pace(self.steps_done)
        shown = asked = time.perf_counter()
        pin = self.worker.device.type == "cuda"
        for step, micro_batches in prefetch(self.batches.iter_steps(epoch, self.progress.step), pin=pin):
            self.pace.waited_s += time.perf_counter() - asked
            loss = self.train_step(micro_batches, epoch=epoch, step=step)
            self.advance(loss)
            if time.perf_counter() - shown > PROGRESS_EVERY_S:
                shown = time.perf_counter()
                self.send_progress()
            if self.is_over():
                return
            self.pause()
            asked = time.perf_counter()

    def advance(self, loss: float) -> None:
        """Count one step, and log it where it is time to."""
        progress = self.progress
        progress.step += 1
        progress.loss_sum += loss
        progress.loss_steps += 1
        progress.seconds = time.perf_counter() - self.began
        if self.tracker and _is_due(self.steps_done, self.task.log_every_steps):
            values = {
                "loss": loss,
                "learning_rate": self.learner.learning_rate,
                "gradient_norm": float(self.gradient_norm),
                **self.speed(),
            }
            self.tracker.log_step(values, self.steps_done)

    def pause(self) -> None:
        """Evaluate or keep a checkpoint within the epoch, where the settings ask for it at this step."""
        step = self.progress.step
        if step == self.task.steps_per_epoch:
            return
        if _is_due(self.steps_done, self.recipe.evaluate_every_steps):
            self.measure()
            self.pace = _Pace(self.steps_done)
        elif _is_due(step, self.task.checkpoint_every_steps):
            self.report({"score": MID_EPOCH_SCORE, "epoch": self.progress.epoch, "step": step})

    def speed(self) -> dict[str, float]:
        """Images/s and the share of time spent waiting for them, since the last evaluation; GPU memory."""
        elapsed = time.perf_counter() - self.pace.started
        images = (self.steps_done - self.pace.first_step) * self.recipe.batch_size
        found = {"images_per_s": images / elapsed, "data_wait": self.pace.waited_s / elapsed}
        if self.worker.device.type == "cuda":
            found["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.worker.device) / 2**30
        return found

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
        if self.worker.device.type == "cuda":
            self.pieces = self.find_pieces()

    def find_pieces(self) -> int:
        """Into how many pieces a micro-batch is cut so that it fits into memory, by trying on every worker.

        Raises:
            JobFailed: a single image does not fit.
        """
        size, pieces = self.recipe.micro_batch(self.worker.world_size), 1
        image_spec = self.task.model_spec.image_spec
        while not fits_in_memory(self.model, -(-size // pieces), image_spec, precision=self.precision):
            if pieces == size:
                raise JobFailed("one image does not fit into the memory of the device; use a smaller model")
            pieces = min(2 * pieces, size)
        pieces = int(gather(np.array([pieces]), self.worker).max())
        if pieces > 1 and self.worker.is_main:
            log.warning("%d images do not fit into memory at once: they go in %d pieces", size, pieces)
        return pieces

    def train_step(self, micro_batches: Sequence[MicroBatch], *, epoch: int, step: int) -> float:
        """One optimizer step over the global batch; returns this worker's mean loss."""
        loss = self.accumulate(micro_batches, seed=step_seed(self.recipe.seed, epoch, step))
        if not np.isfinite(loss):
            raise Diverged(
                f"the loss is {loss} at epoch {epoch + 1}, step {step + 1}; "
                "lower --optimizer.learning-rate, or use --precision fp32"
            )
        self.gradient_norm = self.learner.step()
        return loss

    def accumulate(self, micro_batches: Sequence[MicroBatch], *, seed: int) -> float:
        """Gradients of the mean loss over the global batch; micro-batches and workers weigh the same.

        They stay local until the last pass of the step, which averages them over the workers.
        """
        local = getattr(self.parallel, "no_sync", contextlib.nullcontext)
        draws = augment.draw(self.recipe.augment, self.recipe.batch_size, torch.Generator().manual_seed(seed))
        torch.manual_seed(seed + self.worker.rank)
        total, parts = torch.zeros((), device=self.worker.device), len(micro_batches)
        for part, (pixels, targets) in enumerate(micro_batches):
            first = (self.worker.rank * parts + part) * len(pixels)
            images, targets_nc = self.augment(pixels, targets, draws.slice(first, first + len(pixels)))
            cut = zip(images.tensor_split(self.pieces), targets_nc.tensor_split(self.pieces), strict=True)
            for piece, (some, wanted) in enumerate(cut):
                last = (part, piece) == (parts - 1, self.pieces - 1)
                with contextlib.nullcontext() if last else local():
                    with autocast(self.worker.device, self.precision):
                        logits = self.parallel(pixel_values=some).logits
                    share = len(some) / len(images) / parts
                    loss = self.criterion(logits, wanted).mean() * share
                    self.learner.scaler.scale(loss).backward()
                total += loss.detach()
        return float(total)

    def augment(
        self, pixels: Pixels | Tensor, targets: Targets | Tensor, draws: augment.Draws
    ) -> tuple[Tensor, Tensor]:
        """Augmented, standardised images and the targets that belong to them, on the device."""
        spec, device = self.task.model_spec.image_spec, self.worker.device
        size = {"height": spec.height, "width": spec.width}
        on_device = [torch.as_tensor(one).to(device, non_blocking=True) for one in (pixels, targets)]
        images = augment.apply(on_device[0], draws, **size)
        return standardize(images, spec), augment.mix_targets(on_device[1], draws, **size)

    def measure(self) -> None:
        """Evaluate, keep the better of the model's own and its averaged weights, report."""
        speed, progress, n_steps = self.speed(), self.progress, self.task.steps_per_epoch
        model, measured = self.evaluate_best()
        score, ended = self.score(measured), progress.step >= n_steps
        loss = gather(np.array([progress.loss_sum]), self.worker).mean() / max(progress.loss_steps, 1)
        line = {
            "epoch": progress.epoch + 1 if ended else progress.epoch + progress.step / n_steps,
            "step": self.steps_done,
            "loss": float(loss),
            "learning_rate": self.learner.learning_rate,
            **speed,
            "averaged_weights": model is not self.model,
            **(self.count_unreadable() if ended else {}),
            **measured,
        }
        better = score > progress.best_score + self.recipe.early_stopping.min_delta
        self.progress = Progress(
            epoch=progress.epoch + ended,
            step=0 if ended else progress.step,
            best_score=score if better else progress.best_score,
            best_step=self.steps_done if better else progress.best_step,
            seconds=time.perf_counter() - self.began,
            history=(*progress.history, line),
        )
        if self.tracker:
            self.tracker.write(self.progress.history)
        self.report({**line, "score": score}, model=model)
        self.send_progress()

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
        self.began = time.perf_counter() - self.progress.seconds

    def send_progress(self) -> None:
        """One progress message, if someone listens."""
        if not self.worker.is_main or self.task.progress_queue is None:
            return
        progress = self.progress
        last = progress.history[-1] if progress.history else {}
        message = {
            "done": self.steps_done,
            "total": self.task.total_steps,
            "epoch": progress.epoch if progress.step else progress.epoch - 1,
            "loss": progress.loss_sum / progress.loss_steps if progress.loss_steps else last.get("loss"),
            "metric": last.get(self.recipe.metric_for_best_model),
            "images_per_s": self.speed()["images_per_s"] if progress.loss_steps else last["images_per_s"],
        }
        self.task.progress_queue.put_nowait(message)
