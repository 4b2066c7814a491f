"""The loop of one Ray Train worker: batches in, checkpoints and metrics out.

Every worker runs this same code on its share of each global batch. All randomness is a function of the
seed, the epoch and the step, so a run continues from any checkpoint exactly as if it had not stopped, and
two workers see the images that one would. `fitting.py` starts the workers and finishes the run.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from pipelines import augment, checkpoints, metrics, optimisation, storage, vit
from pipelines.checkpoints import Sidecar
from pipelines.ingest import Pixels, PixelStore, stream_batches
from pipelines.losses import Criterion, criterion
from pipelines.recipe import Recipe
from pipelines.sampling import epoch_order
from pipelines.specs import ImageSpec

MID_EPOCH_SCORE = -1e30
"""Score of a checkpoint between two evaluations: never the best, but a number, as Ray's ranking wants."""
EVALUATION_BATCH = 256
PROGRESS_EVERY_S = 1.0


@dataclass(frozen=True)
class Task:
    """All that a worker needs to know beside the pixels; the same on every worker."""

    recipe: Recipe
    """Resolved."""
    classes: vit.Classes
    sidecar: Sidecar
    stored_spec: ImageSpec
    """Shape of the stored training images."""
    train_rows: npt.NDArray[np.int64]
    """Row ids to train on."""
    strata: npt.NDArray[np.int64]
    """Class of each of them (multi-label: its rarest)."""
    validation_rows: npt.NDArray[np.int64]
    class_counts: npt.NDArray[np.int64]
    """Training images per class."""
    streams: bool
    """Training images arrive as a stream of shards and not by row."""
    epoch_images: int
    """Images that one epoch draws."""
    run_uri: str
    checkpoint_every_steps: int
    progress: Any
    """Ray queue for progress lines, or None."""

    @property
    def steps_per_epoch(self) -> int:
        return max(self.epoch_images // self.recipe.batch_size, 1)


@dataclass
class Position:
    """Where the run stands, and what it has seen."""

    epoch: int = 0
    step: int = 0
    """Optimiser steps done within the epoch."""
    best_score: float = -float("inf")
    stale_epochs: int = 0
    loss_sum: float = 0.0
    """Of this epoch's steps so far."""
    history: tuple[dict[str, Any], ...] = ()
    """One entry per finished epoch: the lines of metrics.jsonl."""


@dataclass(frozen=True)
class Place:
    """This worker among the others."""

    rank: int
    workers: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0


def train_worker(config: dict[str, Any]) -> None:
    """What Ray Train calls on every worker; `config` holds one `Task`."""
    import ray.train
    from ray.train.torch import get_device

    context = ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size(), get_device())
    if place.device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // context.get_local_world_size()))
    Trainer(config["task"], place).run()


class Trainer:
    """One worker's model, optimiser and pixels, and the loop over them."""

    def __init__(self, task: Task, place: Place) -> None:
        import ray.train

        self.task, self.place, self.recipe = task, place, task.recipe
        self.model = vit.build(task.recipe, task.classes).to(place.device)
        self.adam = optimisation.adamw(
            vit.parameter_groups(self.model, self.recipe.optimizer), self.recipe.optimizer
        )
        decay = self.recipe.optimizer.ema_decay
        self.averaged = optimisation.Averaged(self.model, decay) if decay else None
        self.precision = optimisation.chosen_precision(self.recipe.precision, place.device)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=self.precision == "fp16")
        self.criterion: Criterion = criterion(
            self.recipe.loss,
            self.recipe.balance,
            task.class_counts,
            len(task.train_rows),
            multi_label=task.classes.multi_label,
        )
        n_classes = len(task.classes.ids)
        shard = ray.train.get_dataset_shard("train")
        self.train_shard = shard if task.streams else None
        self.train_store = None if task.streams else PixelStore(shard, task.stored_spec, n_classes)
        self.validation = PixelStore(
            ray.train.get_dataset_shard("validation"), task.sidecar.image_spec, n_classes
        )
        self.position = Position()
        self.board = TensorBoard(task.run_uri) if place.leads else None
        self.restore()

    def run(self) -> None:
        """Every epoch that is left: train, evaluate, report, perhaps stop."""
        while self.position.epoch < self.recipe.epochs and not self.is_stale():
            started = time.perf_counter()
            first_step = self.position.step
            self.train_epoch()
            trained_s = time.perf_counter() - started
            images = (self.task.steps_per_epoch - first_step) * self.recipe.batch_size
            self.finish_epoch(images_per_s=images / trained_s)

    def is_stale(self) -> bool:
        patience = self.recipe.stopping.patience_epochs
        return bool(patience) and self.position.stale_epochs >= patience

    def train_epoch(self) -> None:
        """Every step that is left of this epoch."""
        epoch, n_steps = self.position.epoch, self.task.steps_per_epoch
        vit.freeze(self.model, self.recipe.network, epoch)
        parallel = self.parallel()
        parallel.train()
        told = started = time.perf_counter()
        first = self.position.step
        for step, micro_batches in self.steps(epoch, first):
            rate = self.recipe.optimizer.learning_rate * optimisation.learning_rate_share(
                self.recipe.optimizer, epoch * n_steps + step, self.recipe.epochs * n_steps
            )
            optimisation.set_learning_rate(self.adam, rate)
            self.position.loss_sum += self.train_step(parallel, micro_batches, epoch=epoch, step=step)
            self.position.step = step + 1
            if time.perf_counter() - told > PROGRESS_EVERY_S:
                told = time.perf_counter()
                self.tell((step + 1 - first) * self.recipe.batch_size / (told - started))
            every = self.task.checkpoint_every_steps
            if every and (step + 1) % every == 0 and step + 1 < n_steps:
                self.report({"score": MID_EPOCH_SCORE, "epoch": epoch, "step": step + 1}, with_model=False)

    def parallel(self) -> Any:
        """The model as this epoch trains it: compiled if asked, gradients averaged over the workers."""
        model = torch.compile(self.model) if self.recipe.network.compile else self.model
        if self.place.workers == 1:
            return model
        ids = [self.place.device.index] if self.place.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def train_step(self, parallel: Any, micro_batches: Any, *, epoch: int, step: int) -> float:
        """One optimiser step; returns this worker's mean loss."""
        recipe, spec = self.recipe, self.task.sidecar.image_spec
        seed = step_seed(recipe.seed, epoch, step)
        draws = augment.draw(recipe.augment, recipe.batch_size, torch.Generator().manual_seed(seed))
        torch.manual_seed(seed + self.place.rank)
        size = recipe.micro_batch(self.place.workers)
        accumulation = recipe.optimizer.accumulation
        total = 0.0
        for part, (pixels, targets) in enumerate(micro_batches):
            start = (self.place.rank * accumulation + part) * size
            mine = draws.slice(start, start + len(pixels))
            images = augment.apply(
                torch.from_numpy(pixels).to(self.place.device), mine, height=spec.height, width=spec.width
            )
            targets_nc = augment.mix_targets(
                torch.from_numpy(targets).to(self.place.device), mine, height=spec.height, width=spec.width
            )
            with optimisation.autocast(self.place.device, self.precision):
                logits = parallel(pixel_values=self.normalised(images)).logits
            loss = self.criterion(logits, targets_nc).mean() / accumulation
            with synchronising(parallel, last=part == accumulation - 1):
                self.scaler.scale(loss).backward()
            total += float(loss.detach())
        self.update()
        return total

    def update(self) -> None:
        """Clip, step, average."""
        if self.recipe.optimizer.clip_norm:
            self.scaler.unscale_(self.adam)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip_norm)
        self.scaler.step(self.adam)
        self.scaler.update()
        self.adam.zero_grad(set_to_none=True)
        if self.averaged:
            self.averaged.update(self.model)

    def steps(self, epoch: int, first: int) -> Iterator[tuple[int, list[tuple[Pixels, Any]]]]:
        """This worker's micro-batches of each step from `first` on."""
        source = self.streamed(epoch) if self.task.streams else self.drawn(epoch, first)
        for step in range(self.task.steps_per_epoch):
            if step < first and not self.task.streams:
                continue
            batches = [next(source) for _ in range(self.recipe.optimizer.accumulation)]
            if step >= first:
                yield step, batches

    def drawn(self, epoch: int, first: int) -> Iterator[tuple[Pixels, Any]]:
        """Micro-batches by row, in the order that the seed gives this epoch."""
        assert self.train_store is not None
        recipe, task = self.recipe, self.task
        order = epoch_order(
            task.strata, recipe.balance, views=recipe.augment.views or 1, seed=recipe.seed, epoch=epoch
        )
        rows = task.train_rows[np.resize(order, task.steps_per_epoch * recipe.batch_size)]
        size, accumulation = recipe.micro_batch(self.place.workers), recipe.optimizer.accumulation
        for step in range(first, task.steps_per_epoch):
            for part in range(accumulation):
                start = step * recipe.batch_size + (self.place.rank * accumulation + part) * size
                yield self.train_store.take(rows[start : start + size])

    def streamed(self, epoch: int) -> Iterator[tuple[Pixels, Any]]:
        """Micro-batches of this worker's shard, as often as the recipe asks for views."""
        for view in range(self.recipe.augment.views or 1):
            yield from stream_batches(
                self.train_shard,
                self.task.stored_spec,
                len(self.task.classes.ids),
                batch_size=self.recipe.micro_batch(self.place.workers),
                seed=step_seed(self.recipe.seed, epoch, view),
            )

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        spec = self.task.sidecar.image_spec
        mean = torch.tensor(spec.mean, device=images.device)[:, None, None]
        std = torch.tensor(spec.std, device=images.device)[:, None, None]
        return (images - mean) / std

    def finish_epoch(self, *, images_per_s: float) -> None:
        """Evaluate, keep the better of own and averaged weights, write the line, report."""
        position, n_steps = self.position, self.task.steps_per_epoch
        own = self.evaluate()
        measured, averaged_wins = own, False
        if self.averaged:
            with self.averaged.applied(self.model):
                averaged = self.evaluate()
            averaged_wins = averaged[self.recipe.select_by] >= own[self.recipe.select_by]
            measured = averaged if averaged_wins else own
        score = measured[self.recipe.select_by] * (-1 if self.recipe.select_by in LOWER_IS_BETTER else 1)
        line = {
            "epoch": position.epoch + 1,
            "step": (position.epoch + 1) * n_steps,
            "loss": self.mean_over_workers(position.loss_sum / n_steps),
            "learning_rate": max(group["lr"] / group["scale"] for group in self.adam.param_groups),
            "images_per_s": images_per_s,
            "averaged_weights": averaged_wins,
            **measured,
        }
        better = score > position.best_score + self.recipe.stopping.min_gain
        self.position = Position(
            epoch=position.epoch + 1,
            best_score=score if better else position.best_score,
            stale_epochs=0 if better else position.stale_epochs + 1,
            history=(*position.history, line),
        )
        self.write_history()
        with self.averaged.applied(self.model) if self.averaged and averaged_wins else nothing():
            model_folder = self.model_folder()
        self.report({**line, "score": score}, with_model=True, model_folder=model_folder)
        self.tell(images_per_s)

    def evaluate(self) -> dict[str, float]:
        """Validation metrics, the same on every worker."""
        logits, targets = self.logits(self.task.validation_rows[self.place.rank :: self.place.workers])
        logits_nc, targets_nc = self.gathered(logits), self.gathered(targets)
        truth = targets_nc.astype(np.uint8) if self.task.classes.multi_label else targets_nc.argmax(1)
        loss = self.criterion(torch.from_numpy(logits_nc), torch.from_numpy(targets_nc)).mean()
        return {"validation_loss": float(loss), **metrics.classification(logits_nc, truth)}

    @torch.no_grad()
    def logits(self, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Logits and targets of these validation rows."""
        self.model.eval()
        n_classes = len(self.task.classes.ids)
        found = [np.zeros((0, n_classes), np.float32)]
        wanted = [np.zeros((0, n_classes), np.float32)]
        for start in range(0, len(rows), EVALUATION_BATCH):
            pixels, targets_nc = self.validation.take(rows[start : start + EVALUATION_BATCH])
            images = torch.from_numpy(pixels).to(self.place.device).permute(0, 3, 1, 2).float() / 255
            with optimisation.autocast(self.place.device, self.precision):
                logits = self.model(pixel_values=self.normalised(images)).logits
            found.append(logits.float().cpu().numpy())
            wanted.append(targets_nc)
        self.model.train()
        return np.concatenate(found), np.concatenate(wanted)

    def gathered(self, mine: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The rows of all workers."""
        if self.place.workers == 1:
            return mine
        parts: list[Any] = [None] * self.place.workers
        dist.all_gather_object(parts, mine)
        return np.concatenate(parts)

    def mean_over_workers(self, value: float) -> float:
        return float(self.gathered(np.array([value], np.float32)).mean())

    def model_folder(self) -> Path | None:
        """The model as evaluated, in Hugging Face layout, in a temporary folder; on the leading worker only."""
        if not self.place.leads:
            return None
        folder = Path(tempfile.mkdtemp()) / checkpoints.MODEL_FOLDER
        checkpoints.write_model(self.model, folder, self.task.sidecar)
        return folder

    def report(self, line: dict[str, Any], *, with_model: bool, model_folder: Path | None = None) -> None:
        """Hand metrics and a checkpoint to Ray; a barrier over all workers."""
        import ray.train

        if not self.place.leads:
            ray.train.report(line)
            return
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            checkpoints.save_state(folder, self.state())
            if with_model and model_folder is not None:
                model_folder.rename(folder / checkpoints.MODEL_FOLDER)
                model_folder.parent.rmdir()
            ray.train.report(line, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def state(self) -> dict[str, Any]:
        position = asdict(self.position)
        return {
            "model": self.model.state_dict(),
            "optimizer": self.adam.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged else None,
            "position": {**position, "history": json.dumps(position["history"])},
        }

    def restore(self) -> None:
        """Continue from the run's last checkpoint, if there is one."""
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            state = checkpoints.load_state(Path(folder), self.place.device)
        self.model.load_state_dict(state["model"])
        self.adam.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.averaged:
            self.averaged.load_state_dict(state["averaged"])
        position = state["position"]
        self.position = Position(**{**position, "history": tuple(json.loads(position["history"]))})

    def write_history(self) -> None:
        """metrics.jsonl as a whole: after a restart it holds each epoch once."""
        if self.board is None:
            return
        lines = "".join(json.dumps(line) + "\n" for line in self.position.history)
        storage.open_storage(self.task.run_uri).put("metrics.jsonl", lines.encode())
        self.board.write(self.position.history[-1])

    def tell(self, images_per_s: float) -> None:
        """One progress message, if someone listens."""
        if not self.place.leads or self.task.progress is None:
            return
        position = self.position
        last = position.history[-1] if position.history else {}
        self.task.progress.put_nowait_batch([
            {
                "done": position.epoch * self.task.steps_per_epoch + position.step,
                "total": self.recipe.epochs * self.task.steps_per_epoch,
                "epoch": position.epoch,
                "loss": position.loss_sum / position.step if position.step else last.get("loss"),
                "metric": last.get(self.recipe.select_by),
                "images_per_s": images_per_s,
            }
        ])  # fmt: skip


LOWER_IS_BETTER = frozenset({"validation_loss", "log_loss", "ece"})


def step_seed(seed: int, epoch: int, step: int) -> int:
    """One number per step that no other step of any run shares by construction."""
    return int(np.random.SeedSequence([seed, epoch, step]).generate_state(1, np.uint32)[0])


def nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def synchronising(parallel: Any, *, last: bool) -> Any:
    """Average gradients over the workers only with the last micro-batch of a step."""
    return nothing() if last or not hasattr(parallel, "no_sync") else parallel.no_sync()


class TensorBoard:
    """Event files beside metrics.jsonl; written locally and copied, since storages cannot append."""

    def __init__(self, run_uri: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = Path(tempfile.mkdtemp(prefix="tensorboard-"))
        self.writer = SummaryWriter(str(self.folder))
        self.storage = storage.open_storage(run_uri)

    def write(self, line: dict[str, Any]) -> None:
        for name, value in line.items():
            if isinstance(value, (int, float)) and name not in ("epoch", "step"):
                self.writer.add_scalar(name, value, line["step"])
        self.writer.flush()
        for file in self.folder.iterdir():
            self.storage.put(f"tensorboard/{file.name}", file.read_bytes())
