"""Turn scored images into the pictures of a report: a sample, the worst mistakes, doubtful labels, attention.

Only the images that are shown are fetched and decoded again, so the size of the test split does not matter.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.datasets import pixels
from pipelines.evaluation import attention
from pipelines.evaluation.evaluation import Scored
from pipelines.evaluation.metrics import Array
from pipelines.evaluation.report import ReportExtras, ReportImage, caption_images
from pipelines.images.pixels import pixels_of
from pipelines.specs import DecodeLimits, ImageSpec
from pipelines.status import Status
from pipelines.taxonomy.taxonomy import Taxonomy

ATTENTION_MAPS = 12


def make_gallery(
    scored: Scored, taxonomy: Taxonomy, images: pa.Table, spec: ImageSpec, *, network: Any = None
) -> ReportExtras:
    """The pictures of a report.

    Args:
        images: where each row of `scored` comes from, in that order: columns of `LabelledData.rows`.
        network: the trained model, for maps of its attention; without one, or without attention over
            patches in it, there are none.
    """
    sample, worst, doubtful = (fetch_images(images, rows, spec) for rows in choose_images(scored))
    looked = add_attention(sample[:ATTENTION_MAPS], spec, network) if network is not None else []
    return ReportExtras(
        sample=caption_images(scored, taxonomy, sample),
        worst=caption_images(scored, taxonomy, worst),
        doubtful=caption_images(scored, taxonomy, doubtful),
        attention=caption_images(scored, taxonomy, looked),
    )


def choose_images(
    scored: Scored, *, sample: int = 24, worst: int = 12, seed: int = 0
) -> tuple[Array, Array, Array]:
    """Rows worth showing: a sample that visits every class in turn, mistakes and doubtful labels by loss."""
    order = np.random.default_rng(seed).permutation(len(scored.targets))
    turn = _turns(scored.targets_nc[order].argmax(axis=1))
    visited = order[np.argsort(turn, kind="stable")]
    by_loss = np.argsort(-scored.loss, kind="stable")
    mistakes, doubtful = (by_loss[which[by_loss]][:worst] for which in (scored.wrong, scored.doubtful))
    return visited[:sample], mistakes, doubtful


def _turns(groups: Array) -> Array:
    """How many earlier entries are equal to each entry: [7, 7, 3, 7] -> [0, 1, 0, 2]."""
    sorted_by_group = np.argsort(groups, kind="stable")
    ordered = groups[sorted_by_group]
    found = np.empty(len(groups), np.int64)
    found[sorted_by_group] = np.arange(len(groups)) - np.searchsorted(ordered, ordered)
    return found


def fetch_images(images: pa.Table, rows: Array, spec: ImageSpec) -> list[ReportImage]:
    """These rows' images as the model saw them; one that cannot be read again is left out."""
    chosen = images.take(pa.array(rows))
    if "item_id" not in chosen.column_names:
        chosen = chosen.append_column("item_id", pa.array(rows, pa.int64()))
    loaded = pixels.decode_batch(chosen, spec, DecodeLimits())
    pixels_nhwc = pixels_of(loaded["pixels"], spec)
    return [
        ReportImage(int(row), uri, pixels_hwc)
        for row, uri, pixels_hwc, status in zip(
            rows, chosen["uri"].to_pylist(), pixels_nhwc, loaded["status"].to_pylist(), strict=True
        )
        if status == Status.OK
    ]


def add_attention(images: list[ReportImage], spec: ImageSpec, network: Any) -> list[ReportImage]:
    """The images with their roll-out maps; none for a model that has no attention over patches."""
    if not images:
        return []
    try:
        maps = attention.roll_out(network, np.stack([image.pixels_hwc for image in images]), spec)
    except attention.NoAttention:
        return []
    return [
        ReportImage(image.row, image.uri, image.pixels_hwc, seen)
        for image, seen in zip(images, maps, strict=True)
    ]
