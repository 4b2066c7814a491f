"""Turn the scores of labelled images into an `Evaluation`: every number and curve of a report, as plain data.

It knows arrays and the taxonomy, no files, pictures or pages: `report.py` draws it. What it says of
thresholds is measured on the images given here; `about`, which the caller gives, says so where they were
fitted on the same ones.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from sklearn import metrics as sk

from pipelines.bundle.categories import count_published, list_categories
from pipelines.bundle.labelling import DEFAULT_THRESHOLD
from pipelines.evaluation import hierarchy, metrics
from pipelines.evaluation.metrics import Array
from pipelines.taxonomy.taxonomy import Rollup, Taxonomy

BIASED = "their precision is biased upward"
"""What is said of thresholds where they were fitted on the same images."""
CURVE_POINTS = 150
MEASURES = ("precision", "recall", "f1")
CLASS_BINS = 8
"""Bins of one class's probability: fewer images of it than of all."""
SLICES_SHOWN = 50
"""Values of one column."""
CURVES_SHOWN = 6
"""Classes with a ROC and a precision-recall curve of their own: more cannot be told apart in one plot."""


@dataclass(frozen=True)
class Scored:
    """What a model said of labelled images."""

    class_ids: tuple[str, ...]
    """Taxonomy ids in the order of the columns below."""
    logits_nc: Array
    """As the network gives them, before any temperature."""
    probabilities_nc: Array
    """Calibrated: what is published."""
    targets: Array
    """Class indices `[N]`, or a 0/1 matrix `[N, C]` for a multi-label model."""

    def __post_init__(self) -> None:
        metrics.check_aligned(self.probabilities_nc, self.targets)
        expected = (len(self.probabilities_nc), len(self.class_ids))
        if not self.logits_nc.shape == self.probabilities_nc.shape == expected:
            shapes = f"logits {self.logits_nc.shape}, probabilities {self.probabilities_nc.shape}"
            raise ValueError(f"{shapes}; {len(self.class_ids)} class ids and the targets need {expected}")

    @property
    def multi_label(self) -> bool:
        return self.targets.ndim == 2

    def at_temperature(self, temperature: float) -> Self:
        """The same with the probabilities that this temperature gives."""
        scores_nc = metrics.probabilities(
            self.logits_nc, temperature=temperature, multi_label=self.multi_label
        )
        return replace(self, probabilities_nc=scores_nc)

    @cached_property
    def targets_nc(self) -> Array:
        return metrics.indicator(self.targets, len(self.class_ids))

    @cached_property
    def predicted(self) -> Array:
        """Index of the best class of each image."""
        return np.asarray(self.probabilities_nc.argmax(axis=1))

    @cached_property
    def given_nc(self) -> Array:
        """0/1: the labels that the model gives, one per image or every one that is more likely than not."""
        if self.multi_label:
            return (self.probabilities_nc >= metrics.LABEL_GIVEN).astype(np.uint8)
        return metrics.indicator(self.predicted, len(self.class_ids))

    @cached_property
    def ranking(self) -> tuple[Array, Array]:
        """ROC-AUC and average precision of each class."""
        return metrics.ranking_per_class(self.probabilities_nc, self.targets_nc)

    @cached_property
    def loss(self) -> Array:
        """Cross entropy of each image: how wrong the model was about it."""
        likelihood_nc = np.where(self.targets_nc > 0, self.probabilities_nc, 1 - self.probabilities_nc)
        log_nc = np.log(np.maximum(likelihood_nc.astype(np.float64), 1e-12))
        return np.asarray(-(log_nc if self.multi_label else log_nc * self.targets_nc).sum(axis=1))

    @cached_property
    def likely_nc(self) -> Array:
        """0/1: the labels that each image probably has, which are its own unless these are doubtful."""
        return metrics.likely_labels(self.probabilities_nc, self.targets_nc, multi_label=self.multi_label)

    @cached_property
    def doubtful(self) -> Array:
        """Whether an image's labels are probably others, `bool[N]`."""
        return np.asarray((self.likely_nc != self.targets_nc).any(axis=1))

    @cached_property
    def wrong(self) -> Array:
        """Whether the given labels are not exactly the true ones, `bool[N]`."""
        return np.asarray((self.given_nc != self.targets_nc).any(axis=1))


@dataclass(frozen=True)
class Evaluation:
    """Every number of one evaluation; `to_json` is `evaluation.json`."""

    about: Mapping[str, str]
    """What was measured: model, dataset, split, taxonomy."""
    multi_label: bool
    n_images: int
    overall: Mapping[str, float]
    """Accuracy and its relatives, over all images."""
    intervals: Mapping[str, list[float]]
    """95 % intervals of some of them: [low, high]."""
    classes: list[dict[str, Any]]
    """One row per class, in the model's order."""
    tiers: list[dict[str, Any]]
    """One row per tier of the taxonomy, from its rolled-up probabilities."""
    hierarchy: Mapping[str, float]
    """Measures along the tree."""
    calibration: Mapping[str, Any]
    """Error and reliability bins, before and after the temperature."""
    coverage: Mapping[str, list[float]]
    """Threshold, share of images answered, precision of the answers."""
    published: Mapping[str, float]
    """What `cat` would hold: categories at or above their thresholds, ancestors included."""
    publishable: str
    """How many categories have a threshold that a score can reach, and which, in words."""
    categories: list[dict[str, Any]]
    """Each class and ancestor: its threshold, the images that have it, are given it, and rightly so."""
    curves: Mapping[str, Any]
    """ROC and precision-recall curves of the average and of a few classes."""
    slices: list[dict[str, Any]]
    """One row per value of the columns sliced by: images, share whose labels are right, interval."""
    doubtful: int
    """Images whose labels are probably wrong, by confident learning."""
    confusions: list[list[int]] = field(default_factory=list)
    """Non-zero cells of the confusion matrix: [true class, predicted class, images]; none if multi-label."""

    def document(self) -> dict[str, Any]:
        """All of it as plain data: floats to 6 significant digits, None for what is undefined."""
        fields: dict[str, Any] = plain(asdict(self))
        return fields

    def to_json(self) -> str:
        """The text of `evaluation.json`."""
        return json.dumps(self.document(), ensure_ascii=False, allow_nan=False) + "\n"


def evaluate(
    scored: Scored,
    taxonomy: Taxonomy,
    *,
    thresholds: Mapping[str, float] | None = None,
    about: Mapping[str, str] | None = None,
    slices: Mapping[str, Sequence[str | None]] | None = None,
) -> Evaluation:
    """Measure everything that a report shows.

    Args:
        thresholds: category id -> probability from which it is published; `DEFAULT_THRESHOLD` without one.
        about: lines for the report's head, such as the model and the dataset.
        slices: column -> value of each image.
    """
    rollup = taxonomy.rollup(scored.class_ids)
    measure = metrics.multi_label if scored.multi_label else metrics.single_label
    return Evaluation(
        about=dict(about or {}),
        multi_label=scored.multi_label,
        n_images=len(scored.targets),
        overall=measure(scored.probabilities_nc, scored.targets),
        intervals=_intervals(scored),
        classes=_classes(scored, taxonomy, thresholds or {}),
        tiers=hierarchy.by_tier(
            scored.probabilities_nc, scored.targets_nc, rollup, multi_label=scored.multi_label
        ),
        hierarchy=_hierarchy(scored, rollup),
        calibration=_calibration(scored),
        coverage=_coverage(scored),
        published=_published(scored, rollup, thresholds or {}),
        publishable=count_published(list_categories(taxonomy, scored.class_ids, thresholds or {})),
        categories=_categories(scored, rollup, thresholds or {}),
        curves=_curves(scored),
        slices=[row for name, values in (slices or {}).items() for row in _slices(scored, name, values)],
        doubtful=int(scored.doubtful.sum()),
        confusions=_confusions(scored),
    )


def _intervals(scored: Scored) -> dict[str, list[float]]:
    found = metrics.macro_intervals(scored.given_nc, scored.targets_nc)
    right, n = np.array((~scored.wrong).sum()), np.array(len(scored.wrong))
    found["exact_match" if scored.multi_label else "accuracy"] = metrics.wilson(right, n).tolist()
    return found


def _classes(scored: Scored, taxonomy: Taxonomy, thresholds: Mapping[str, float]) -> list[dict[str, Any]]:
    counts = metrics.per_class(scored.given_nc, scored.targets_nc, len(scored.class_ids))
    roc_auc, average_precision = scored.ranking
    limits = np.array([thresholds.get(one, DEFAULT_THRESHOLD) for one in scored.class_ids], np.float32)
    passing_nc = (scored.probabilities_nc >= limits).astype(np.uint8)
    published = metrics.per_class(passing_nc, scored.targets_nc, len(scored.class_ids))
    columns = {
        "id": scored.class_ids,
        "name": [taxonomy.node(one).name for one in scored.class_ids],
        "path": [taxonomy.path(one) for one in scored.class_ids],
        "tier1": [taxonomy.tier1(one) for one in scored.class_ids],
        "threshold": [thresholds.get(one) for one in scored.class_ids],
        "images": counts.support.tolist(),
        "given": counts.given.tolist(),
        "correct": counts.correct.tolist(),
        **{name: getattr(counts, name).tolist() for name in MEASURES},
        **{f"{name}_interval": getattr(counts, f"{name}_interval").tolist() for name in MEASURES},
        "average_precision": average_precision.tolist(),
        "roc_auc": roc_auc.tolist(),
        "published": published.given.tolist(),
        **{f"published_{name}": getattr(published, name).tolist() for name in MEASURES},
        "ece": metrics.class_errors(scored.probabilities_nc, scored.targets).tolist(),
        "mean_probability": scored.probabilities_nc.mean(axis=0, dtype=np.float64).tolist(),
        "share": scored.targets_nc.mean(axis=0, dtype=np.float64).tolist(),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _slices(scored: Scored, column: str, values: Sequence[str | None]) -> list[dict[str, Any]]:
    """A row per value of a column, the most frequent first; what comes after SLICES_SHOWN is left out."""
    names, number = np.unique(["" if value is None else value for value in values], return_inverse=True)
    images, right = np.bincount(number), np.bincount(number, weights=~scored.wrong)
    intervals = metrics.wilson(right, images)
    return [
        {
            "column": column,
            "value": str(names[i]),
            "images": int(images[i]),
            "right": float(right[i] / images[i]),
            "interval": intervals[i].tolist(),
        }
        for i in np.argsort(-images, kind="stable")[:SLICES_SHOWN]
    ]


def _hierarchy(scored: Scored, rollup: Rollup) -> dict[str, float]:
    found = hierarchy.overall(scored.given_nc, scored.targets_nc, rollup)
    if not scored.multi_label:
        found |= hierarchy.mistakes(scored.predicted, scored.targets, rollup)
    return found


def _calibration(scored: Scored) -> dict[str, Any]:
    raw_nc = metrics.probabilities(scored.logits_nc, multi_label=scored.multi_label)
    return {
        "before": _describe_bins(metrics.reliability(raw_nc, scored.targets)),
        "after": _describe_bins(metrics.reliability(scored.probabilities_nc, scored.targets)),
        "classes": _least_reliable(scored),
    }


def _describe_bins(bins: metrics.Reliability) -> dict[str, Any]:
    return {"ece": bins.error} | {name: values.tolist() for name, values in vars(bins).items()}


def _least_reliable(scored: Scored) -> list[dict[str, Any]]:
    """Reliability of the own probability of the classes with the largest calibration errors."""
    errors = metrics.class_errors(scored.probabilities_nc, scored.targets)
    known = np.flatnonzero(np.isfinite(errors))
    shown = known[np.argsort(-errors[known], kind="stable")][:CURVES_SHOWN]
    bins = (metrics.binned(scored.probabilities_nc[:, c], scored.targets_nc[:, c], CLASS_BINS) for c in shown)
    described = zip(shown.tolist(), map(_describe_bins, bins), strict=True)
    return [{"class": c, **one, "ece": float(errors[c])} for c, one in described]


def _coverage(scored: Scored) -> dict[str, list[float]]:
    best = scored.predicted
    rows = np.arange(len(best))
    return metrics.coverage_curve(
        scored.probabilities_nc[rows, best], scored.targets_nc[rows, best] > 0, points=CURVE_POINTS
    )


def _categories(scored: Scored, rollup: Rollup, thresholds: Mapping[str, float]) -> list[dict[str, Any]]:
    """The rows of `list_categories`, with the images given each id and those of them that have it."""
    listed = list_categories(rollup.taxonomy, scored.class_ids, thresholds)
    counts = metrics.per_class(*_passing(scored, rollup, thresholds), len(listed))
    columns = zip(counts.support.tolist(), counts.given.tolist(), counts.correct.tolist(), strict=True)
    return [
        {**asdict(one), "images": images, "given": given, "correct": correct}
        for one, (images, given, correct) in zip(listed, columns, strict=True)
    ]


def _passing(scored: Scored, rollup: Rollup, thresholds: Mapping[str, float]) -> tuple[Array, Array]:
    """Which categories each image is given at the thresholds, and which it has: bool [images, categories]."""
    limits = np.array([thresholds.get(one, DEFAULT_THRESHOLD) for one in rollup.ids], np.float32)
    passing_nr = rollup.apply(scored.probabilities_nc, multi_label=scored.multi_label) >= limits
    return passing_nr, hierarchy.widened(scored.targets_nc, rollup)


def _published(scored: Scored, rollup: Rollup, thresholds: Mapping[str, float]) -> dict[str, float]:
    """Count (image, category) pairs: those published, those true, those both."""
    passing_nr, truth_nr = _passing(scored, rollup, thresholds)
    right, given, true = (int(pairs.sum()) for pairs in (passing_nr & truth_nr, passing_nr, truth_nr))
    return {
        "coverage": float(passing_nr.any(axis=1).mean()),
        **({"precision": right / given} if given else {}),
        "recall": right / true if true else 0.0,
        "categories_per_image": given / len(passing_nr),
    }


def _curves(scored: Scored) -> dict[str, Any]:
    usable = metrics.rankable(scored.targets_nc)
    if not usable.size:
        return {}
    _, average_precision = scored.ranking
    ranked = usable[np.argsort(-average_precision[usable], kind="stable")]
    half = CURVES_SHOWN // 2
    shown = ranked if len(ranked) <= CURVES_SHOWN else np.concatenate([ranked[:half], ranked[-half:]])
    average = _curve(scored.targets_nc.ravel(), scored.probabilities_nc.ravel())
    return {
        "average": average,
        "classes": [
            {"class": int(c), **_curve(scored.targets_nc[:, c], scored.probabilities_nc[:, c])} for c in shown
        ],
    }


def _curve(truth: Array, scores: Array) -> dict[str, Any]:
    false_positive, true_positive, _ = sk.roc_curve(truth, scores)
    precision, recall, _ = sk.precision_recall_curve(truth, scores)
    roc = _along(false_positive, true_positive)
    pr = _along(recall, precision)
    return {
        "roc_auc": float(sk.roc_auc_score(truth, scores)),
        "average_precision": float(sk.average_precision_score(truth, scores)),
        "false_positive_rate": false_positive[roc].tolist(),
        "true_positive_rate": true_positive[roc].tolist(),
        "precision": precision[pr].tolist(),
        "recall": recall[pr].tolist(),
    }


def _along(x: Array, y: Array) -> Array:
    """Indices of at most `CURVE_POINTS` points of a curve, evenly spread over its length."""
    length = np.append(0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y))))
    wanted = np.linspace(0, length[-1], CURVE_POINTS)
    return np.unique(np.append(np.searchsorted(length, wanted * (1 - 1e-12)), len(x) - 1))


def _confusions(scored: Scored) -> list[list[int]]:
    if scored.multi_label:
        return []
    n = len(scored.class_ids)
    counts_cc = sk.confusion_matrix(scored.targets, scored.predicted, labels=np.arange(n))
    true, predicted = np.nonzero(counts_cc)
    return np.column_stack([true, predicted, counts_cc[true, predicted]]).tolist()  # type: ignore[no-any-return]


def plain(value: Any) -> Any:
    """The value as JSON can hold it: NaN becomes None, floats keep 6 significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value
