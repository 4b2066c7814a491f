"""An `Inspection` -> `inspection.html`, one page that needs no network, and `inspection.json`."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.datasets.dataset import LabelledData
from pipelines.evaluation import plots
from pipelines.evaluation.gallery import fetch_images
from pipelines.evaluation.page import open_environment
from pipelines.images.pixels import jpeg_uri
from pipelines.inspection.inspect import Inspection, label_texts
from pipelines.messages import redacted
from pipelines.specs import ImageSpec
from pipelines.status import Status
from pipelines.storage import storage

PAGE_FILE, DATA_FILE = "inspection.html", "inspection.json"

SHOWN = ImageSpec(height=112, width=112, fit="crop")
"""Pixels of a picture on the page: some 4 KB each."""
PICTURES = 1500
"""Most pictures in the grids of all classes together: 6 MB."""
PER_CLASS = 8
GROUPS_SHOWN = 60
"""Duplicates with pictures; the JSON file has all."""
PER_GROUP = 4
"""Pictures of one group."""
LISTED = 200
"""Unreadable images on the page; the JSON file has all."""


def write_inspection(found: Inspection, data: LabelledData, images: pa.Table, output_uri: str) -> None:
    """Write the page, then the JSON, into a folder of any storage.

    Args:
        images: the table that `inspect_dataset` returned with it.
    """
    folder = storage.open_storage(output_uri)
    folder.put(PAGE_FILE, render(found, data, images).encode())
    document = redacted(found.document(data.recorded_uris()))
    folder.put(DATA_FILE, (json.dumps(document, ensure_ascii=False, indent=1) + "\n").encode())


def render(found: Inspection, data: LabelledData, images: pa.Table) -> str:
    """The page as one HTML text."""
    of_class = sample_classes(data, images)
    groups = found.duplicates[:GROUPS_SHOWN]
    wanted = {row for rows in of_class.values() for row in rows}
    wanted |= {row for one in groups for row in one.rows[:PER_GROUP]}
    counts = {split: {one["id"]: one["images"][split] for one in found.classes} for split in found.images}
    return (
        open_environment("pipelines.inspection", "pipelines.evaluation")
        .get_template("inspection.html")
        .render(
            i=found,
            total=data.rows.num_rows,
            balance=plots.plot_balance(counts, found.classes),
            pictures=fetch_pictures(images, sorted(wanted)),
            of_class=of_class,
            groups=groups,
            per_group=PER_GROUP,
            listed=LISTED,
            uris=data.recorded_uris(),
            splits=data.splits.tolist(),
            labels=label_texts(data),
            json_file=DATA_FILE,
        )
    )


def sample_classes(data: LabelledData, images: pa.Table, *, seed: int = 0) -> dict[str, list[int]]:
    """Class id -> random row numbers of its readable images."""
    n = min(PER_CLASS, max(1, PICTURES // len(data.classes)))
    readable = pa.compute.equal(images["status"], Status.OK).to_numpy()
    order = np.random.default_rng(seed).permutation(np.flatnonzero(readable))
    indices = images["classes"].to_pylist()
    found: dict[str, list[int]] = {one: [] for one in data.classes}
    for row in order.tolist():
        for index in indices[row]:
            if len(found[data.classes[index]]) < n:
                found[data.classes[index]].append(row)
    return found


def fetch_pictures(images: pa.Table, rows: Sequence[int]) -> dict[int, str]:
    """Row number -> the picture as a JPEG `data:` URI; one that cannot be read again has none."""
    step = 256
    chunks = [np.array(rows[start : start + step], np.int64) for start in range(0, len(rows), step)]
    shown: list[Any] = [one for chunk in chunks for one in fetch_images(images, chunk, SHOWN)]
    return {one.row: jpeg_uri(one.pixels_hwc) for one in shown}
