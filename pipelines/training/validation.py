"""Metrics of the validation images during training, computed by all workers together."""

from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed

from pipelines.datasets.normalize import normalize
from pipelines.evaluation import metrics
from pipelines.training import layers
from pipelines.training.batches import MicroBatch, Targets
from pipelines.training.losses import Criterion
from pipelines.training.optimizer import autocast
from pipelines.training.task import Task, Worker

_Value = TypeVar("_Value")


def validate(
    model: Any,
    batches: Iterable[MicroBatch],
    task: Task,
    worker: Worker,
    *,
    criterion: Criterion,
    precision: str,
) -> dict[str, float]:
    """Loss and metrics over the batches of all workers, computed by the leading one and the same on each."""
    logits, targets = compute_logits(model, batches, task, precision=precision)
    logits_nc, targets_nc = gather(logits, worker), gather(targets, worker)
    measured: dict[str, float] = {}
    if worker.is_main:
        truth = targets_nc.astype(np.uint8) if task.classes.multi_label else targets_nc.argmax(1)
        loss = criterion(torch.from_numpy(logits_nc), torch.from_numpy(targets_nc)).mean()
        measured = {"validation_loss": float(loss), **metrics.classification(logits_nc, truth)}
    return from_main(measured, worker)


def compute_logits(
    model: Any, batches: Iterable[MicroBatch], task: Task, *, precision: str
) -> tuple[npt.NDArray[np.float32], Targets]:
    """Logits and targets of all images of these batches."""
    device = next(model.parameters()).device
    n_classes = len(task.classes.ids)
    found, wanted = [np.zeros((0, n_classes), np.float32)], [np.zeros((0, n_classes), np.float32)]
    model.eval()
    for pixels, targets_nc in batches:
        images = normalize(torch.from_numpy(pixels).to(device), task.model_spec.image_spec)
        # not inference_mode: BEiT keeps a tensor made here, which training could then not use
        with torch.no_grad(), autocast(device, precision):
            logits = model(pixel_values=images).logits
        found.append(logits.float().cpu().numpy())
        wanted.append(targets_nc)
    layers.set_training(model)
    return np.concatenate(found), np.concatenate(wanted)


def gather(mine: npt.NDArray[Any], worker: Worker) -> npt.NDArray[Any]:
    """The rows of all workers."""
    if worker.world_size == 1:
        return mine
    parts: list[Any] = [None] * worker.world_size
    distributed.all_gather_object(parts, mine)
    return np.concatenate(parts)


def from_main(value: _Value, worker: Worker) -> _Value:
    """The leading worker's value, on every worker."""
    if worker.world_size == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, device=worker.device)
    return values[0]
