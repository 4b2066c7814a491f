"""A few training images as the recipe's augmentation leaves them, for a person to judge by eye."""

import numpy as np
import pyarrow as pa
import torch

from pipelines.datasets import pixels as ingest
from pipelines.datasets import splits
from pipelines.evaluation.report import Shown
from pipelines.specs import ImageSpec
from pipelines.status import Status
from pipelines.training import augment
from pipelines.training.decoded import DecodedData
from pipelines.training.recipe import Recipe

IMAGES = 8
"""Shown on the report's sheet."""


def augmented_samples(corpus: DecodedData, recipe: Recipe) -> list[Shown]:
    """Random training images, each changed once as a training step would; unreadable ones are left out."""
    rows = corpus.rows[splits.TRAIN]
    chosen = np.random.default_rng(recipe.seed).choice(rows, min(IMAGES, len(rows)), replace=False)
    table = corpus.data.rows.take(pa.array(chosen)).append_column("item_id", pa.array(chosen, pa.int64()))
    decoded = ingest.decode_batch(table, corpus.stored_spec)
    readable = pa.compute.equal(decoded["status"], Status.OK)
    pixels_nhwc = ingest.pixels_of(decoded.filter(readable), corpus.stored_spec)
    changed = changed_pixels(pixels_nhwc, recipe, corpus.spec)
    uris = table["uri"].filter(readable).to_pylist()
    return [Shown(i, uri, pixels) for i, (uri, pixels) in enumerate(zip(uris, changed, strict=True))]


def changed_pixels(pixels_nhwc: ingest.Pixels, recipe: Recipe, spec: ImageSpec) -> ingest.Pixels:
    """uint8 [n, height, width, 3] after one draw of the recipe's augmentation."""
    generator = torch.Generator().manual_seed(recipe.seed)
    draws = augment.draw(recipe.augment, len(pixels_nhwc), generator)
    images = augment.apply(torch.from_numpy(pixels_nhwc.copy()), draws, height=spec.height, width=spec.width)
    changed: ingest.Pixels = (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    return changed
