"""A labelled dataset -> `Inspection`: counts, unreadable images, duplicates, sizes, formats, as plain data.

Every image is fetched and decoded once, in threads of this process. No page and no picture is made here.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.datasets import splits
from pipelines.datasets.dataset import LabelledData, refuse_untrainable
from pipelines.datasets.errors import DatasetError
from pipelines.datasets.pixels import decode_batch
from pipelines.images.pixels import pixels_of
from pipelines.inspection.duplicates import HASHED, MAX_DISTANCE, group_alike, hash_pictures
from pipelines.messages import redact
from pipelines.status import Status

ORDER = (splits.TRAIN, splits.VALIDATION, splits.TEST)
ROWS_PER_CHUNK = 64
QUANTILES = {"min": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "max": 1.0}
SMALL_SIDE = 224
"""Shorter side, pixels, below which an image is enlarged for most pretrained models."""


@dataclass(frozen=True)
class Duplicates:
    """Images that show the same picture."""

    rows: tuple[int, ...]
    """Their row numbers in the dataset."""
    exact: bool
    """Whether they are the same bytes."""
    splits: tuple[str, ...]
    labels: tuple[str, ...]
    """Their distinct labels, as paths; several labels of one image in one text."""

    @property
    def serious(self) -> int:
        """How many things are wrong: in several splits, with different labels."""
        return (len(self.splits) > 1) + (len(self.labels) > 1)


@dataclass(frozen=True)
class Inspection:
    """What is in a dataset."""

    about: Mapping[str, str]
    """Dataset, taxonomy, who divided it."""
    warnings: Sequence[str]
    """What should be fixed before training, in sentences."""
    images: Mapping[str, int]
    """Split -> images."""
    left_out: Mapping[str, int]
    """Rows that were not read, by reason."""
    classes: Sequence[Mapping[str, Any]]
    """id, name, path, and the number of images of each split."""
    unreadable: Sequence[Mapping[str, str]]
    """uri, label, split, status, error."""
    formats: Mapping[str, int]
    sizes: Mapping[str, Mapping[str, int]]
    """width, height, shorter side -> quantile -> pixels."""
    small: int
    """Images whose shorter side is below `SMALL_SIDE` pixels."""
    duplicates: Sequence[Duplicates]
    """The serious ones first."""

    def document(self, uris: Sequence[str]) -> dict[str, Any]:
        """All of it as plain data; duplicates by their URIs."""
        duplicates = [{**asdict(one), "uris": [uris[row] for row in one.rows]} for one in self.duplicates]
        for one in duplicates:
            del one["rows"]
        return {**asdict(self), "duplicates": duplicates}


def inspect_dataset(
    data: LabelledData, *, threads: int, max_distance: int = MAX_DISTANCE
) -> tuple[Inspection, pa.Table]:
    """What is in the dataset, and its images: columns of `data.rows`, `schema.LOADED` and the hash."""
    images = load_images(data, threads=threads)
    duplicates = find_duplicates(data, images, max_distance=max_distance)
    unreadable = list_unreadable(data, images)
    usable = images.filter(pa.compute.equal(images["status"], Status.OK))
    width, height = (usable[name].to_numpy() for name in ("width_px", "height_px"))
    shorter = np.minimum(width, height)
    found = Inspection(
        about=_about(data),
        warnings=[*_warn_of_division(data), *_warn_of_images(data, unreadable, duplicates)],
        images={name: len(rows) for name, rows in data.rows_by_split().items()},
        left_out={reason: count for reason, count in data.dropped.items() if count},
        classes=count_classes(data),
        unreadable=unreadable,
        formats=dict(Counter(usable["format"].to_pylist()).most_common()),
        sizes={
            name: _quantiles(sides)
            for name, sides in (("width", width), ("height", height), ("shorter side", shorter))
            if len(sides)
        },
        small=int((shorter < SMALL_SIDE).sum()),
        duplicates=duplicates,
    )
    return found, images


def load_images(data: LabelledData, *, threads: int) -> pa.Table:
    """The dataset's rows with what decoding made of each: `schema.LOADED` and the column `hash`."""
    rows = data.rows.append_column("item_id", pa.array(range(data.rows.num_rows), pa.int64()))
    chunks = [rows.slice(start, ROWS_PER_CHUNK) for start in range(0, rows.num_rows, ROWS_PER_CHUNK)]
    with ThreadPoolExecutor(threads) as pool:
        loaded = pa.concat_tables(pool.map(_load_batch, chunks))
    for name in loaded.column_names:
        if name not in rows.column_names:
            rows = rows.append_column(name, loaded[name])
    return rows


def _load_batch(batch: pa.Table) -> pa.Table:
    decoded = decode_batch(batch, HASHED)
    hashes, structured = hash_pictures(pixels_of(decoded["pixels"], HASHED))
    known = structured & pa.compute.equal(decoded["status"], Status.OK).to_numpy()
    return decoded.drop_columns(["pixels"]).append_column("hash", pa.array(hashes, mask=~known))


def label_texts(data: LabelledData) -> list[str]:
    """The labels of each image as paths of the taxonomy, several in one text."""
    paths = [data.taxonomy.path(one) for one in data.classes]
    return [" | ".join(paths[i] for i in indices) for indices in data.rows["classes"].to_pylist()]


def find_duplicates(data: LabelledData, images: pa.Table, *, max_distance: int) -> list[Duplicates]:
    """Groups of at least two images of the same bytes or alike, those in several splits or classes first."""
    hashed = np.flatnonzero(images["hash"].is_valid())
    alike = group_alike(images["hash"].take(pa.array(hashed)).to_numpy(), max_distance)
    groups: dict[str | int, list[int]] = {}
    for row, group in zip(hashed.tolist(), alike.tolist(), strict=True):
        groups.setdefault(group, []).append(row)
    digests = images["sha256"].to_pylist()
    for row in np.flatnonzero(images["hash"].is_null()).tolist():
        if digests[row] is not None:  # a broken or a blank picture: only the same bytes are the same
            groups.setdefault(digests[row], []).append(row)
    texts, where = label_texts(data), data.splits.tolist()
    found = [
        Duplicates(
            rows=tuple(rows),
            exact=len({digests[row] for row in rows}) == 1,
            splits=tuple(sorted({where[row] for row in rows}, key=ORDER.index)),
            labels=tuple(dict.fromkeys(texts[row] for row in rows)),
        )
        for rows in groups.values()
        if len(rows) > 1
    ]
    return sorted(found, key=lambda one: (-one.serious, -len(one.rows), one.rows))


def list_unreadable(data: LabelledData, images: pa.Table) -> list[dict[str, str]]:
    """The images that cannot be used, with the reason of each."""
    texts, where, uris = label_texts(data), data.splits.tolist(), data.recorded_uris()
    bad = np.flatnonzero(pa.compute.not_equal(images["status"], Status.OK))
    outcomes = images.select(["status", "error"]).take(pa.array(bad)).to_pylist()
    return [
        {
            "uri": uris[row],
            "label": texts[row],
            "split": where[row],
            "status": outcome["status"],
            "error": redact(outcome["error"] or ""),
        }
        for row, outcome in zip(bad.tolist(), outcomes, strict=True)
    ]


def count_classes(data: LabelledData) -> list[dict[str, Any]]:
    """Every class with its images in each split."""
    counts = data.images_per_class(data.rows_by_split())
    return [
        {
            "id": one,
            "name": data.taxonomy.node(one).name,
            "path": data.taxonomy.path(one),
            "images": {split: of_class[one] for split, of_class in counts.items()},
        }
        for one in data.classes
    ]


def _about(data: LabelledData) -> dict[str, str]:
    here = ", ".join(sorted(data.divided_here))
    return {
        "dataset": redact(data.settings.uri),
        "taxonomy": data.taxonomy.name,
        "labels": "several per image" if data.multi_label else "one per image",
        "division": f"made here: {here}" if here else "the dataset's own",
    }


def _warn_of_division(data: LabelledData) -> Iterable[str]:
    try:
        refuse_untrainable(data)
    except DatasetError as error:
        yield f"{redact(str(error))}."
    for split, of_class in data.images_per_class(data.rows_by_split()).items():
        without = [data.taxonomy.path(one) for one, count in of_class.items() if not count]
        if without and split != splits.TEST:
            yield f"{len(without)} classes have no {split} image: {_few(without)}."


def _warn_of_images(
    data: LabelledData, unreadable: Sequence[Mapping[str, str]], duplicates: Sequence[Duplicates]
) -> Iterable[str]:
    if unreadable:
        reasons = Counter(one["status"] for one in unreadable).most_common()
        listed = ", ".join(f"{count} {status}" for status, count in reasons)
        yield f"{len(unreadable)} of {data.rows.num_rows} images cannot be read: {listed}."
    across = sum(len(one.splits) > 1 for one in duplicates)
    if across:
        are = "picture is" if across == 1 else "pictures are"
        yield f"{across} {are} in several splits: what is measured there will be too good."
    differing = sum(len(one.labels) > 1 for one in duplicates)
    if differing:
        have = "picture has" if differing == 1 else "pictures have"
        yield f"{differing} {have} different labels in different places."


def _few(names: Sequence[str]) -> str:
    further = len(names) - 5
    return ", ".join(names[:5]) + (f" and {further} more" if further > 0 else "")


def _quantiles(sides: Any) -> dict[str, int]:
    values = np.quantile(sides, list(QUANTILES.values()), method="nearest")
    return dict(zip(QUANTILES, map(int, values), strict=True))
