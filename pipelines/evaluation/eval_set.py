"""A labelled dataset -> the images to evaluate a model on, with their labels as classes of the model.

A label below a class counts as that class; one that no class covers is left out and counted. `Leakage` says
whether the model was trained on these images.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipelines.datasets import splits
from pipelines.datasets.dataset import LabelledData
from pipelines.datasets.pixels import class_matrix
from pipelines.evaluation.metrics import Array
from pipelines.messages import InputError
from pipelines.taxonomy.taxonomy import Taxonomy

ALL = "all"
"""In place of a split: every image of the dataset."""


@dataclass(frozen=True)
class EvalSet:
    """Images to evaluate a model on, and the right answers."""

    images: pa.Table
    """Rows of `LabelledData.rows` with their `item_id`."""
    targets: Array
    """Class indices `[N]` of the model, or a 0/1 matrix for a multi-label one."""
    uncovered: Mapping[str, int] = field(default_factory=dict)
    """Label that no class of the model covers -> images that have it."""


@dataclass(frozen=True)
class Leakage:
    """Whether the model was trained on the images that it is evaluated on."""

    summary: str
    suspected: bool
    """Whether the numbers may be too good."""


def build_eval_set(
    data: LabelledData, split: str, class_ids: Sequence[str], taxonomy: Taxonomy, *, multi_label: bool
) -> EvalSet:
    """The split's images with their labels as classes of the model; `split` may be `all`.

    Raises:
        InputError: the split is empty, no label fits, or images have several labels for a model of one.
    """
    if data.multi_label and not multi_label:
        raise InputError(f"{data.settings.uri} has several labels per image; the model gives one")
    rows = np.arange(data.rows.num_rows) if split == ALL else data.indices(split)
    if not len(rows):
        counts = ", ".join(f"{n} {name}" for name, n in sorted(Counter(data.splits.tolist()).items()))
        raise InputError(f"{data.settings.uri} has no image in split {split!r} ({counts}); use --split all")
    images = data.take(rows)
    covering = np.array([find_covering_class(one, class_ids, taxonomy) for one in data.classes], np.int64)
    labels = images["classes"].to_pylist()
    uncovered = Counter(data.classes[i] for indices in labels for i in indices if covering[i] < 0)
    kept = np.array([multi_label or bool((covering[indices] >= 0).all()) for indices in labels])
    if not kept.any():
        listed = ", ".join(list(uncovered)[:5])
        raise InputError(f"no class of the model covers the labels of {data.settings.uri}: {listed}")
    covered = [[c for c in covering[indices] if c >= 0] for indices in labels]
    targets_nc = class_matrix(pa.array(covered, pa.list_(pa.int32())), len(class_ids))[kept]
    targets = targets_nc if multi_label else targets_nc.argmax(axis=1)
    return EvalSet(images.filter(pa.array(kept)), targets, uncovered)


def find_covering_class(node_id: str, class_ids: Sequence[str], taxonomy: Taxonomy) -> int:
    """Index of the class that is the label or its nearest ancestor; -1 where there is none."""
    if node_id not in taxonomy:
        return -1
    index = {class_id: i for i, class_id in enumerate(class_ids)}
    return next((index[one] for one in (node_id, *taxonomy.ancestors(node_id)) if one in index), -1)


def find_leakage(data: LabelledData, split: str, recorded: Mapping[str, str] | None) -> Leakage:
    """How many of a split's images the model was trained on, as far as that is known.

    `recorded` are the splits that the model's run wrote down: image URI -> split.
    """
    divided_here = split in data.divided_here
    if recorded is None and divided_here:
        return Leakage(f"unknown, as {split} was drawn here and not by the model's run", True)
    if recorded is None:
        own = "it was given none of these images" if split == ALL else "it kept to the dataset's own splits"
        return Leakage(f"none, if {own}", False)
    uris = np.array(data.recorded_uris(), dtype=object)
    evaluated = uris if split == ALL else uris[data.indices(split)]
    trained = sum(recorded.get(uri) == splits.TRAIN for uri in evaluated)
    unknown = sum(uri not in recorded for uri in evaluated)
    elsewhere = f"; {unknown} are at addresses that its run does not know" if unknown else ""
    suspected = (trained > 0 and split != splits.TRAIN) or (unknown > 0 and divided_here)
    return Leakage(f"{trained} of {len(evaluated)} images{elsewhere}", suspected)
