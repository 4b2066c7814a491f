"""The images of one worker, in the order in which it trains on them and measures them."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipelines.datasets import pixels
from pipelines.images.prepare import Pixels
from pipelines.training.decoded import epoch_order
from pipelines.training.task import Task, Worker, step_seed

VALIDATION_BATCH = 256

Targets = npt.NDArray[np.float32]
MicroBatch = tuple[Pixels | torch.Tensor, Targets | torch.Tensor]
Step = tuple[int, list[MicroBatch]]


class Batches:
    """Micro-batches of training images and batches of validation images.

    `training` and `validation` are each a `PixelStore`, or this worker's shard when the task streams.
    """

    def __init__(self, task: Task, worker: Worker, training: Any, validation: Any) -> None:
        self.task, self.worker = task, worker
        self.training, self.validation = training, validation
        self.tally = pixels.Tally()

    def iter_steps(self, epoch: int, first: int) -> Iterator[Step]:
        """The micro-batches of each step from `first` on."""
        parts = self.task.recipe.optimizer.gradient_accumulation_steps
        source = self.iter_stream(epoch) if self.task.streams else self.iter_random(epoch, first)
        for _ in range(first * parts if self.task.streams else 0):
            next(source)
        for step in range(first, self.task.steps_per_epoch):
            yield step, [next(source) for _ in range(parts)]

    def iter_random(self, epoch: int, first: int) -> Iterator[MicroBatch]:
        """Micro-batches by row, in the order that the seed gives this epoch."""
        recipe, n_steps = self.task.recipe, self.task.steps_per_epoch
        views = recipe.augment.repeats or 1
        order = epoch_order(
            self.task.strata, recipe.class_balance, views=views, seed=recipe.seed, epoch=epoch
        )
        order = np.resize(order, n_steps * recipe.batch_size)  # repeats images when they fill no batch
        parts = recipe.optimizer.gradient_accumulation_steps
        rows = self.task.train_rows[order].reshape(n_steps, self.worker.world_size, parts, -1)
        for step in range(first, n_steps):
            for part in rows[step, self.worker.rank]:
                yield self.training.take(part)

    def iter_stream(self, epoch: int) -> Iterator[MicroBatch]:
        """Micro-batches of this worker's shard, pass after pass without end."""
        task = self.task
        size, n_classes = task.recipe.micro_batch(self.worker.world_size), len(task.classes.ids)
        for view in itertools.count():
            seed = step_seed(task.recipe.seed, epoch, view)
            yield from pixels.stream_batches(
                self.training, task.stored_spec, n_classes, batch_size=size, seed=seed, tally=self.tally
            )

    def iter_validation(self) -> Iterator[MicroBatch]:
        """This worker's share of the validation images."""
        task = self.task
        rows, n_classes = task.validation_rows, len(task.classes.ids)
        if task.streams:
            yield from pixels.evaluation_batches(
                self.validation,
                task.model_spec.image_spec,
                n_classes,
                batch_size=VALIDATION_BATCH,
                rows=rows,
                tally=self.tally,
            )
            return
        mine = rows[self.worker.rank :: self.worker.world_size]
        for start in range(0, len(mine), VALIDATION_BATCH):
            yield self.validation.take(mine[start : start + VALIDATION_BATCH])


def prefetch(steps: Iterator[Step], *, pin: bool) -> Iterator[Step]:
    """The same steps, each read in a thread while the one before is trained on.

    Args:
        pin: put them into page-locked memory, from which a GPU copies without making Python wait.
    """

    def read() -> Step | None:
        step = next(steps, None)
        if step is None or not pin:
            return step
        number, micro_batches = step
        return number, [tuple(torch.as_tensor(one).pin_memory() for one in pair) for pair in micro_batches]  # type: ignore[misc]

    with ThreadPoolExecutor(1, "prefetch") as reader:
        coming = reader.submit(read)
        while (step := coming.result()) is not None:
            coming = reader.submit(read)
            yield step
