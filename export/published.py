"""What the predictions table will say: the published columns of both sides, and what decides them.

Logits alone prove nothing of thresholds, of the taxonomy or of the names in `labels.parquet`. The reference
has them from the checkpoint, the candidate from the files of the bundle as written and read back.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.bundle import bundle, categories
from pipelines.bundle.bundle import Bundle
from pipelines.bundle.labelling import Labeller, build_labeller
from pipelines.bundle.limits import Limits
from pipelines.specs import ModelSpec
from pipelines.storage import storage
from pipelines.taxonomy.taxonomy import Taxonomy

_COLUMNS = ["top_id", "tier1_id", "cat"]


@dataclass(frozen=True)
class Contract:
    """What turns one side's probabilities into published columns, and what names the ids in them."""

    spec: ModelSpec
    taxonomy: Taxonomy
    cattax: int
    labels: pa.Table
    """Rows of `labels.parquet`."""
    categories: pa.Table
    """Rows of `categories.parquet`, by id."""

    @cached_property
    def labeller(self) -> Labeller:
        return build_labeller(self.spec, self.taxonomy, top_k=1)

    def columns(self, probabilities_nc: np.ndarray) -> dict[str, list[Any]]:
        """`top_id`, and as sets `tier1_id` and `cat`, of each image; NaN counts as 0."""
        finite_nc = np.nan_to_num(probabilities_nc.astype(np.float32), nan=0.0)
        table = self.labeller.label(finite_nc).select(_COLUMNS).to_pydict()
        tier1 = [frozenset([one]) for one in table["tier1_id"]]
        return {**table, "tier1_id": tier1, "cat": [frozenset(ids) for ids in table["cat"]]}


def contract_of(spec: ModelSpec, taxonomy: Taxonomy) -> Contract:
    """The contract that a model of this spec must have in its bundle."""
    return Contract(
        spec,
        taxonomy,
        taxonomy.cattax,
        labels_table(spec.class_ids, taxonomy),
        _read_categories(categories.categories_bytes(spec, taxonomy)),
    )


def contract_in(opened: Bundle) -> Contract:
    """The contract that a bundle's files hold."""
    folder = storage.open_storage(opened.uri)
    held = categories.FILE in opened.manifest.files
    table = _read_categories(folder.read(categories.FILE)) if held else categories.CATEGORIES.empty_table()
    return Contract(opened.spec, opened.taxonomy(), opened.manifest.cattax, opened.labels, table)


def _read_categories(payload: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(payload)).sort_by("id")


def labels_table(class_ids: Sequence[str], taxonomy: Taxonomy) -> pa.Table:
    """The classes in graph order, with their position in the taxonomy."""
    rows = [
        {**asdict(taxonomy.node(class_id)), "class_index": index, "path": taxonomy.path(class_id)}
        for index, class_id in enumerate(class_ids)
    ]
    return pa.Table.from_pylist(rows, schema=bundle.LABELS)


def compare(
    reference: Contract,
    candidate: Contract,
    *,
    reference_nc: np.ndarray,
    candidate_nc: np.ndarray,
    limits: Limits,
) -> dict[str, Any]:
    """Differences of the contracts, and of the columns that they make of each side's probabilities.

    Args:
        reference_nc: probabilities of the reference, in its order of classes.
        candidate_nc: probabilities of the candidate, in its own order of classes.
    """
    found: dict[str, Any] = contract_differences(reference, candidate)
    if set(reference.spec.class_ids) != set(candidate.spec.class_ids):
        return {**found, "published_differ": len(reference_nc), "tier1": None, "cat": None}
    expected = reference.columns(reference_nc)
    index = {class_id: column for column, class_id in enumerate(reference.spec.class_ids)}
    in_its_order = [index[class_id] for class_id in candidate.spec.class_ids]
    of_same = candidate.columns(reference_nc[:, in_its_order])
    differ = [any(expected[c][row] != of_same[c][row] for c in _COLUMNS) for row in range(len(reference_nc))]
    published = candidate.columns(candidate_nc)
    rolled_nr = reference.labeller.rollup.apply(
        reference_nc.astype(np.float32), multi_label=reference.spec.multi_label
    )
    near_best = _near_best(reference, rolled_nr, limits.published_margin)
    near_threshold = _near_threshold(reference, rolled_nr, limits.published_margin)
    return {
        **found,
        "published_differ": sum(differ),
        "tier1": _agreement(expected["tier1_id"], published["tier1_id"], near_best),
        "cat": _agreement(expected["cat"], published["cat"], near_threshold),
    }


def contract_differences(reference: Contract, candidate: Contract) -> dict[str, int]:
    """How many facts of each kind the candidate states otherwise."""
    ids = {*reference.spec.thresholds, *candidate.spec.thresholds}
    thresholds = [[one.spec.thresholds.get(i) for i in ids] for one in (reference, candidate)]
    rows, expected = (one.labels.to_pylist() for one in (candidate, reference))
    named = ("multi_label", "image_spec")
    ours, theirs = (asdict(one.spec) for one in (candidate, reference))
    return {
        "thresholds_differ": sum(a != b for a, b in zip(*thresholds, strict=True)),
        "cattax_differs": int(reference.cattax != candidate.cattax),
        "label_rows_differ": abs(len(rows) - len(expected))
        + sum({**a, "class_index": 0} not in [{**b, "class_index": 0} for b in expected] for a in rows),
        "categories_differ": int(not reference.categories.equals(candidate.categories)),
        "spec_differs": sum(ours[name] != theirs[name] for name in named),
    }


def _near_threshold(reference: Contract, rolled_nr: np.ndarray, margin: float) -> list[set[str]]:
    """Ids of each image whose reference probability is within the margin of their threshold."""
    near_nr = np.abs(rolled_nr - reference.labeller.thresholds) <= margin
    ids = reference.labeller.rollup.ids
    return [{ids[column] for column in np.flatnonzero(row)} for row in near_nr]


def _near_best(reference: Contract, rolled_nr: np.ndarray, margin: float) -> list[set[str]]:
    """Tier 1 ids of each image that the reference finds about as probable as its best one."""
    positions = reference.labeller.tier1_positions
    ids = [reference.labeller.rollup.ids[column] for column in positions]
    scores_nt = rolled_nr[:, positions]
    near_nt = scores_nt >= scores_nt.max(axis=1, keepdims=True) - margin
    return [{ids[column] for column in np.flatnonzero(row)} for row in near_nt]


def _agreement(
    expected: Sequence[frozenset[str]], found: Sequence[frozenset[str]], near: Sequence[set[str]]
) -> dict[str, Any]:
    """Images with the same value; a difference of nothing but ids that are near is a tie."""
    same = ties = 0
    for before, after, close in zip(expected, found, near, strict=True):
        same += before == after
        ties += before != after and before ^ after <= close
    return {
        "same": same,
        "ties": ties,
        "different": len(expected) - same - ties,
        "share": (same + ties) / max(len(expected), 1),
    }
