"""Drawn pictures of a few classes as files and as decoded blocks, and a trainer over them in this process."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from pipelines.datasets import pixels, splits
from pipelines.datasets.dataset import LabelledData
from pipelines.schema import pixels_type
from pipelines.specs import ImageSpec, ModelSpec
from pipelines.training import model
from pipelines.training.batches import Batches
from pipelines.training.loop import Trainer
from pipelines.training.recipe import Augment, Loss, Optimizer, Recipe
from pipelines.training.task import Task, Worker

COLOURS = np.array([(210, 60, 50), (60, 200, 70), (60, 80, 220), (220, 210, 60)], np.uint8)
ALONE = Worker(0, 1, torch.device("cpu"))
STILL = Augment(repeats=1, min_crop_scale=1, crop_aspect=1, flip=0)
"""No augmentation at all."""
RECIPE = Recipe(
    model="scratch:tiny", image_size=16, patch_size=8, layers=2, epochs=2, batch_size=16, precision="fp32",
    augment=STILL, loss=Loss(label_smoothing=0), optimizer=Optimizer(learning_rate=1e-3, ema_decay=0),
)  # fmt: skip


def picture(
    labels: Sequence[int], rng: np.random.Generator, *, side: int = 16, noise: int = 60
) -> np.ndarray:
    """uint8 [side, side, 3]: noise with a patch of each label's colour, each in its own quarter."""
    canvas = rng.integers(128 - noise, 128 + noise, (side, side, 3)).astype(np.uint8)
    half = side // 2
    for label in labels:
        y, x = divmod(label, 2)
        canvas[y * half : y * half + half, x * half : x * half + half] = COLOURS[label]
    return canvas


def image_folder(root: Path, per_class: int = 12, classes: Sequence[str] = ("483", "1", "v9i3On")) -> Path:
    """`root/<label>/n.png`."""
    rng = np.random.default_rng(5)
    for index, label in enumerate(classes):
        (root / label).mkdir(parents=True)
        for n in range(per_class):
            Image.fromarray(picture([index], rng, side=24)).save(root / label / f"{n}.png")
    return root


class Blocks:
    """Decoded rows as a Ray Data iterator would give them."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def iter_batches(self, batch_size: int | None = None, **_: Any) -> Iterator[pa.Table]:
        step = batch_size or -(-self.table.num_rows // 2)
        yield from (self.table.slice(start, step) for start in range(0, self.table.num_rows, step))


def decoded(pixels_nhwc: np.ndarray, labels: Sequence[Sequence[int]], *, lost: Sequence[int] = ()) -> Blocks:
    """Rows of these pixels; those lost since the first pass are black."""
    pixels_nhwc[list(lost)] = 0
    columns = {
        "item_id": pa.array(range(len(labels)), pa.int64()),
        "status": ["not_found" if row in lost else "ok" for row in range(len(labels))],
        "classes": pa.array([list(row) for row in labels], pa.list_(pa.int32())),
        "pixels": pa.FixedSizeBinaryArray.from_buffers(
            pixels_type(*pixels_nhwc.shape[1:3]), len(labels), [None, pa.py_buffer(pixels_nhwc)]
        ),
    }
    return Blocks(pa.table(columns))


def drawn(
    labels: Sequence[Sequence[int]], *, seed: int = 0, noise: int = 60, lost: Sequence[int] = ()
) -> Blocks:
    rng = np.random.default_rng(seed)
    return decoded(np.stack([picture(row, rng, noise=noise) for row in labels]), labels, lost=lost)


def trainer(
    recipe: Recipe,
    labels: Sequence[Sequence[int]],
    *,
    n_classes: int = 3,
    multi_label: bool = False,
    worker: Worker = ALONE,
    noise: int = 60,
) -> Trainer:
    """A worker in this process; its validation images are drawn like the training ones with another seed."""
    blocks, held_out = drawn(labels, seed=0, noise=noise), drawn(labels, seed=99, noise=noise)
    classes = model.Classes(tuple(f"class {i}" for i in range(n_classes)), multi_label)
    return trainer_over(recipe, blocks, held_out, classes, worker)


def trainer_of(recipe: Recipe, pixels_nhwc: np.ndarray, labels: np.ndarray, *, n_classes: int) -> Trainer:
    """A worker in this process over these pixels, one label each, already of the model's size."""
    blocks = decoded(pixels_nhwc, labels[:, None].tolist())
    return trainer_over(
        recipe, blocks, blocks, model.Classes(tuple(map(str, range(n_classes))), False), ALONE
    )


def trainer_on(recipe: Recipe, data: LabelledData) -> Trainer:
    """A worker in this process over the images of a dataset, decoded at the model's size."""
    spec, blocks = ImageSpec(height=recipe.image_size, width=recipe.image_size), []
    for name in (splits.TRAIN, splits.VALIDATION):
        rows = data.rows.take(pa.array(data.indices(name)))
        images = rows.append_column("item_id", pa.array(range(rows.num_rows), pa.int64()))
        blocks.append(Blocks(pixels.decode_batch(images, spec)))
    return trainer_over(recipe, *blocks, model.Classes(data.classes, data.multi_label), ALONE)


def trainer_over(
    recipe: Recipe, blocks: Blocks, held_out: Blocks, classes: model.Classes, worker: Worker
) -> Trainer:
    n_classes, side = len(classes.ids), recipe.image_size or 16
    spec = ImageSpec(height=side, width=side)
    store, measured = (pixels.PixelStore(one, spec, n_classes) for one in (blocks, held_out))
    rows = np.arange(len(store))
    strata = np.where(store.targets_nc.any(1), store.targets_nc.argmax(1), n_classes)
    task = Task(
        recipe=recipe.resolved(multi_label=classes.multi_label),
        model_spec=ModelSpec(classes.ids, "labels", spec, classes.multi_label),
        stored_spec=spec,
        train_rows=rows,
        strata=strata,
        validation_rows=np.arange(len(measured)),
        class_counts=store.targets_nc.sum(0).astype(np.int64),
        streams=False,
        max_unreadable_fraction=0.05,
        epoch_images=len(store),
        run_uri="",
    )
    made = Trainer(task, worker, Batches(task, worker, store, measured))
    made.parallel = made.model
    made.model.train()
    return made


def streaming(recipe: Recipe, blocks: Blocks) -> Trainer:
    """A worker in this process that streams its images, the same ones for training and validation."""
    made = trainer_over(recipe, blocks, blocks, model.Classes(("a", "b", "c"), False), ALONE)
    made.task = replace(made.task, streams=True)
    made.batches = Batches(made.task, ALONE, blocks, blocks)
    return made


def trained(made: Trainer, epochs: int) -> Trainer:
    """The trainer after so many epochs."""
    for _ in range(epochs):
        made.train_epoch()
        made.progress = replace(made.progress, epoch=made.progress.epoch + 1, step=0)
    return made


def curve(rank: int, workers: int, accumulation: int, folder: str) -> None:
    """This process as one of so many workers: train 50 steps and leave its losses in the folder."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet{workers}", rank=rank, world_size=workers
    )
    recipe = replace(
        RECIPE,
        epochs=20,
        batch_size=32,
        augment=Augment(repeats=1, mixup=0.3, erasing=0.3, brightness=0.3),
        optimizer=Optimizer(learning_rate=1e-4, ema_decay=0, gradient_accumulation_steps=accumulation),
    )
    made = trainer(recipe, [[i % 3] for i in range(96)], worker=Worker(rank, workers, torch.device("cpu")))
    made.wrap()
    losses = []
    for epoch in range(-(-50 // made.task.steps_per_epoch)):
        for step, batches in made.batches.iter_steps(epoch, 0):
            losses.append(made.train_step(batches, epoch=epoch, step=step))
    np.save(f"{folder}/losses-{workers}-{rank}.npy", np.array(losses[:50]))
    torch.distributed.destroy_process_group()
