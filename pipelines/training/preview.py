"""A few training images as the recipe's augmentation leaves them, for a person to judge by eye."""

import numpy as np
import pyarrow as pa
import torch

from pipelines.datasets import pixels, splits
from pipelines.evaluation.eval_set import take_images
from pipelines.evaluation.report import ReportImage
from pipelines.images.pixels import pixels_of
from pipelines.images.prepare import Pixels
from pipelines.specs import ImageSpec
from pipelines.status import Status
from pipelines.training import augment
from pipelines.training.decoded import DecodedData
from pipelines.training.recipe import Recipe

IMAGES = 8
"""Shown on the report's sheet."""


def augmented_samples(corpus: DecodedData, recipe: Recipe) -> list[ReportImage]:
    """Random training images, each changed once as a training step would; unreadable ones are left out."""
    rows = corpus.rows[splits.TRAIN]
    chosen = np.random.default_rng(recipe.seed).choice(rows, min(IMAGES, len(rows)), replace=False)
    table = take_images(corpus.data, chosen)
    decoded = pixels.decode_batch(table, corpus.stored_spec)
    readable = pa.compute.equal(decoded["status"], Status.OK)
    pixels_nhwc = pixels_of(decoded["pixels"].filter(readable), corpus.stored_spec)
    changed = change_pixels(pixels_nhwc, recipe, corpus.spec)
    uris = table["uri"].filter(readable).to_pylist()
    return [
        ReportImage(i, uri, pixels_hwc) for i, (uri, pixels_hwc) in enumerate(zip(uris, changed, strict=True))
    ]


def change_pixels(pixels_nhwc: Pixels, recipe: Recipe, spec: ImageSpec) -> Pixels:
    """uint8 [n, height, width, 3] after one draw of the recipe's augmentation."""
    generator = torch.Generator().manual_seed(recipe.seed)
    draws = augment.draw(recipe.augment, len(pixels_nhwc), generator)
    images = augment.apply(torch.from_numpy(pixels_nhwc.copy()), draws, height=spec.height, width=spec.width)
    changed: Pixels = (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    return changed
