"""Class probabilities become the label columns of the predictions: top k, Tier 1, OpenRTB `cat`.

Whole batches at a time, numpy in and Arrow out. It runs no model and reads no file.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines import schema
from pipelines.specs import ModelSpec
from pipelines.taxonomy.taxonomy import Rollup, Taxonomy

DEFAULT_THRESHOLD = 0.5
"""Score from which an id enters `cat` when the bundle carries no threshold for it: more likely than not."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Labeller:
    """What turns one model's probabilities into label columns; `build_labeller` makes it."""

    class_ids: pa.Array
    rollup: Rollup
    tier1_positions: npt.NDArray[np.int64]
    thresholds: Floats
    top_k: int
    multi_label: bool

    def label(self, probabilities_nc: Floats) -> pa.Table:
        """The label columns of `schema.SCORED`, one row per image.

        Args:
            probabilities_nc: float32 [images, classes] in the graph's class order.
        """
        top_nk = top_positions(probabilities_nc, self.top_k)
        scores_nk = np.take_along_axis(probabilities_nc, top_nk, axis=1)
        rolled_nr = self.rollup.apply(probabilities_nc, multi_label=self.multi_label)
        ids = pa.array(self.rollup.ids, pa.string())
        tier1 = self.tier1_positions[rolled_nr[:, self.tier1_positions].argmax(axis=1)]
        return pa.table(
            {
                "top_id": self.class_ids.take(pa.array(top_nk[:, 0])),
                "top_score": pa.array(scores_nk[:, 0], pa.float32()),
                "labels": label_lists(self.class_ids, top_nk, scores_nk),
                "tier1_id": ids.take(pa.array(tier1)),
                "tier1_score": pa.array(rolled_nr[np.arange(len(tier1)), tier1], pa.float32()),
                "cat": passing_ids(ids, rolled_nr, self.thresholds),
            }
        )


def build_labeller(spec: ModelSpec, taxonomy: Taxonomy, *, top_k: int) -> Labeller:
    """The labeller of a model; an id without a threshold enters `cat` from `DEFAULT_THRESHOLD`."""
    class_ids = list(spec.class_ids)
    rollup = taxonomy.rollup(class_ids)
    return Labeller(
        class_ids=pa.array(class_ids, pa.string()),
        rollup=rollup,
        tier1_positions=np.array(rollup.tier1, np.int64),
        thresholds=np.array([spec.thresholds.get(id_, DEFAULT_THRESHOLD) for id_ in rollup.ids], np.float32),
        top_k=min(top_k, len(class_ids)),
        multi_label=spec.multi_label,
    )


def top_positions(scores_nc: Floats, k: int) -> npt.NDArray[np.int64]:
    """Positions of the k largest scores of each row, best first; equal scores in class order."""
    kth_n = np.partition(scores_nc, -k, axis=1)[:, -k]
    # k of each row, and more where the k-th is tied
    rows, columns = _sort_within_rows(scores_nc, scores_nc >= kth_n[:, None])
    firsts = np.searchsorted(rows, np.arange(len(scores_nc)))
    top_nk: npt.NDArray[np.int64] = columns[firsts[:, None] + np.arange(k)]
    return top_nk


def label_lists(class_ids: pa.Array, top_nk: npt.NDArray[np.int64], scores_nk: Floats) -> pa.Array:
    n, k = top_nk.shape
    fields = list(schema.LABELS_TYPE.value_type)
    flat = pa.StructArray.from_arrays(
        [class_ids.take(pa.array(top_nk.ravel())), pa.array(scores_nk.ravel(), pa.float32())], fields=fields
    )
    return pa.ListArray.from_arrays(pa.array(np.arange(n + 1) * k, pa.int32()), flat)


def passing_ids(ids: pa.Array, rolled_nr: Floats, thresholds: Floats) -> pa.Array:
    """The ids of each row at or above their threshold, best first."""
    rows, columns = _sort_within_rows(rolled_nr, rolled_nr >= thresholds)
    offsets = np.searchsorted(rows, np.arange(len(rolled_nr) + 1))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), ids.take(pa.array(columns)))


def _sort_within_rows(
    scores_nc: Floats, chosen_nc: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows and columns of the chosen scores by row, then best first; equal scores in column order.

    The few that matter are sorted: two sorts of all 698 classes took most of the time of a batch of 256.
    """
    rows, columns = np.divmod(np.flatnonzero(chosen_nc), scores_nc.shape[1])  # 5x faster than nonzero
    order = np.lexsort((-scores_nc[rows, columns], rows))
    return rows[order], columns[order]
