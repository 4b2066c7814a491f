"""What a training worker is given, how far it is and which of the workers it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipelines.specs import ImageSpec, ModelSpec
from pipelines.training import model
from pipelines.training.recipe import Recipe


@dataclass(frozen=True)
class Task:
    """All that a worker needs besides the pixels; the same on every worker."""

    recipe: Recipe
    """Resolved."""
    model_spec: ModelSpec
    stored_spec: ImageSpec
    """Shape of the stored training images."""
    train_rows: npt.NDArray[np.int64]
    """Row ids to train on."""
    strata: npt.NDArray[np.int64]
    """Class of each of them (multi-label: its rarest)."""
    validation_rows: npt.NDArray[np.int64]
    class_counts: npt.NDArray[np.int64]
    """Images of each class in one pass over the training images, as sampled."""
    streams: bool
    """Images arrive as a stream of shards and not by row."""
    max_unreadable_fraction: float
    """Largest share of an epoch's streamed images that may be unreadable."""
    epoch_images: int
    """Images that one epoch draws."""
    run_uri: str
    runs_at_once: int = 1
    """Trainings that share a machine."""
    checkpoint_every_steps: int = 0
    log_every_steps: int = 0
    trackers: Sequence[str] = ()
    progress_queue: Any = None
    """Ray queue for progress messages, if someone listens."""

    @property
    def classes(self) -> model.Classes:
        return model.Classes(self.model_spec.class_ids, self.model_spec.multi_label)

    @property
    def steps_per_epoch(self) -> int:
        return max(self.epoch_images // self.recipe.batch_size, 1)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, unless it stops early."""
        steps, limit = self.recipe.epochs * self.steps_per_epoch, self.recipe.max_steps
        return min(steps, limit) if limit else steps


@dataclass
class Progress:
    """How far the run is, and what it has measured; part of every checkpoint."""

    epoch: int = 0
    step: int = 0
    """Optimiser steps done within the epoch."""
    best_score: float = -float("inf")
    """What the next score must beat to count as better."""
    best_step: int = 0
    """Steps of the run when that score was measured."""
    loss_sum: float = 0.0
    """Of the steps since the last evaluation."""
    loss_steps: int = 0
    """How many these are."""
    seconds: float = 0.0
    """Training and evaluating, over all restarts."""
    history: tuple[dict[str, Any], ...] = ()
    """One entry per evaluation: the lines of metrics.jsonl."""


@dataclass(frozen=True)
class Worker:
    """One of the processes that train together."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def validation_name(rank: int) -> str:
    """Name under which Ray Train hands a worker its validation images."""
    return f"validation-{rank}"


def step_seed(seed: int, epoch: int, step: int) -> int:
    """One seed for each step of a run."""
    return int(np.random.SeedSequence([seed, epoch, step]).generate_state(1, np.uint32)[0])
