"""Drawn pictures of a few classes as files and as decoded blocks, and a trainer over them in this process."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from pipelines import ingest
from pipelines.checkpoints import Sidecar
from pipelines.recipe import Augment, Loss, Optimizer, Recipe
from pipelines.schema import pixels_type
from pipelines.specs import ImageSpec
from pipelines.task import Place, Task
from pipelines.training import Trainer

COLOURS = np.array([(210, 60, 50), (60, 200, 70), (60, 80, 220), (220, 210, 60)], np.uint8)
SPEC = ImageSpec(height=16, width=16)
STILL = Augment(views=1, crop_area=1, crop_aspect=1, flip=0)
"""No augmentation at all."""
RECIPE = Recipe(
    model="scratch:tiny", image_size=16, patch_size=8, layers=2, epochs=2, batch_size=16, precision="fp32",
    augment=STILL, loss=Loss(label_smoothing=0), optimizer=Optimizer(learning_rate=1e-3, ema_decay=0),
)  # fmt: skip


def picture(labels: Sequence[int], rng: np.random.Generator, *, side: int = 16, noise: int = 60) -> np.ndarray:
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

    def __init__(self, labels: Sequence[Sequence[int]], seed: int = 0, noise: int = 60) -> None:
        rng = np.random.default_rng(seed)
        pixels = np.stack([picture(row, rng, noise=noise) for row in labels])
        self.table = pa.table(
            {
                "row_id": pa.array(range(len(labels)), pa.int64()),
                "classes": pa.array([list(row) for row in labels], pa.list_(pa.int32())),
                "pixels": pa.FixedSizeBinaryArray.from_buffers(
                    pixels_type(16, 16), len(labels), [None, pa.py_buffer(pixels)]
                ),
            }
        )

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        half = self.table.num_rows // 2
        yield from (self.table.slice(0, half), self.table.slice(half))


def trainer(
    recipe: Recipe,
    labels: Sequence[Sequence[int]],
    *,
    n_classes: int = 3,
    multi_label: bool = False,
    rank: int = 0,
    workers: int = 1,
    noise: int = 60,
) -> Trainer:
    """A worker in this process; its validation images are drawn like the training ones with another seed."""
    blocks, held_out = Blocks(labels, noise=noise), Blocks(labels, seed=99, noise=noise)
    targets = ingest.dense(blocks.table["classes"], n_classes)
    ids = tuple(f"class {i}" for i in range(n_classes))
    rows = np.arange(len(labels))
    task = Task(
        recipe=recipe.resolved(multi_label=multi_label),
        sidecar=Sidecar("labels", ids, SPEC, multi_label),
        stored_spec=SPEC,
        train_rows=rows,
        strata=np.array([min(row, default=n_classes) for row in labels]),
        validation_rows=rows,
        class_counts=targets.sum(0).astype(np.int64),
        streams=False,
        epoch_images=len(labels),
        run_uri="",
    )
    made = Trainer(
        task,
        Place(rank, workers, torch.device("cpu")),
        ingest.PixelStore(blocks, SPEC, n_classes),
        ingest.PixelStore(held_out, SPEC, n_classes),
    )
    made.parallel = made.model
    made.model.train()
    return made


def trained(made: Trainer, epochs: int) -> Trainer:
    """The trainer after so many epochs."""
    for _ in range(epochs):
        made.train_epoch()
        made.position = replace(made.position, epoch=made.position.epoch + 1, step=0, loss_sum=0.0)
    return made
