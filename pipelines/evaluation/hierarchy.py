"""Turn class scores into measures along the taxonomy's tree: by tier, by distance, by shared ancestors.

Confusing siblings is a smaller error than confusing unrelated classes; these numbers tell the two apart.
Everything follows from one matrix: which classes are below which categories.
"""

from typing import Any

import numpy as np

from pipelines.evaluation import metrics
from pipelines.evaluation.metrics import Array
from pipelines.taxonomy.taxonomy import Rollup


def ancestry(rollup: Rollup) -> Array:
    """`bool[classes, categories]`: whether a category (a column of the roll-up) is the class or above it."""
    return widened(np.eye(len(rollup.class_ids)), rollup)


def distances(rollup: Rollup) -> Array:
    """`int[classes, classes]`: edges between two classes, Tier 1 categories hanging from one root."""
    lines = ancestry(rollup).astype(np.int64)
    shared, depth = lines @ lines.T, lines.sum(axis=1)
    return np.asarray(depth[:, None] + depth[None, :] - 2 * shared)


def overall(given_nc: Array, targets_nc: Array, rollup: Rollup) -> dict[str, float]:
    """Hierarchical precision, recall and F1: given and true labels, each with all their ancestors, as sets.

    Kiritchenko et al. 2006; Kosmopoulos et al. 2015, section 4.2. Both arrays are 0/1 `[N, classes]`.
    """
    given, truth = (widened(labels_nc, rollup) for labels_nc in (given_nc, targets_nc))
    shared = int((given & truth).sum())
    precision, recall = shared / max(int(given.sum()), 1), shared / max(int(truth.sum()), 1)
    f1 = 2 * precision * recall / (precision + recall) if shared else 0.0
    return {"hierarchical_precision": precision, "hierarchical_recall": recall, "hierarchical_f1": f1}


def widened(labels_nc: Array, rollup: Rollup) -> Array:
    """0/1 labels of classes -> `bool[N, categories]`, true for each label's ancestors too."""
    return np.asarray(rollup.apply(labels_nc.astype(np.float32), multi_label=True) > 0)


def mistakes(predicted: Array, targets: Array, rollup: Rollup) -> dict[str, float]:
    """How far from the truth the answers of a single-label model are, in edges of the tree."""
    edges = distances(rollup)[predicted, targets]
    wrong = edges[edges > 0]
    tier1 = ancestry(rollup)[:, list(rollup.tier1)].argmax(axis=1)
    return {
        "tier1_accuracy_of_top_class": float((tier1[predicted] == tier1[targets]).mean()),
        "mean_distance": float(edges.mean()),
        **({"mean_distance_of_mistakes": float(wrong.mean())} if wrong.size else {}),
    }


def by_tier(
    probabilities_nc: Array, targets_nc: Array, rollup: Rollup, *, multi_label: bool
) -> list[dict[str, Any]]:
    """One row per tier: the categories of that tier judged by their rolled-up probabilities.

    An image whose label is above the tier says nothing about it and is left out.
    """
    scores = rollup.apply(probabilities_nc, multi_label=multi_label)
    truth = widened(targets_nc, rollup)
    tiers = np.array([rollup.taxonomy.node(one).tier for one in rollup.ids])
    rows = []
    for tier in np.unique(tiers):
        columns = np.flatnonzero(tiers == tier)
        known = truth[:, columns].any(axis=1)
        # A single category to choose from would always be right.
        if known.any() and (multi_label or len(columns) > 1):
            judged = _of_tier(scores[known][:, columns], truth[known][:, columns], multi_label)
            rows.append({"tier": int(tier), **judged})
    return rows


def _of_tier(scores_nc: Array, truth_nc: Array, multi_label: bool) -> dict[str, Any]:
    n = scores_nc.shape[1]
    best = scores_nc.argmax(axis=1)
    given_nc = (scores_nc >= metrics.LABEL_GIVEN) if multi_label else metrics.indicator(best, n) > 0
    counts = metrics.per_class(given_nc, truth_nc, n)
    occurring = counts.support > 0
    row: dict[str, Any] = {
        "categories": n,
        "categories_with_images": int(occurring.sum()),
        "images": len(scores_nc),
        "precision_macro": float(np.nan_to_num(counts.precision[occurring]).mean()),
        "balanced_accuracy": float(counts.recall[occurring].mean()),
        "f1_macro": float(counts.f1[occurring].mean()),
        "intervals": metrics.macro_intervals(given_nc, truth_nc),
    }
    if not multi_label:
        right = int((given_nc & truth_nc).any(axis=1).sum())
        row["accuracy"] = right / len(scores_nc)
        row["intervals"]["accuracy"] = metrics.wilson(np.array(right), np.array(len(scores_nc))).tolist()
    return row
