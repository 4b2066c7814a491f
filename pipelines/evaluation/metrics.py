"""Turn scores and true labels into the numbers that a classifier is judged by.

Arrays in, numbers out; nothing here knows a taxonomy, a file or a clock. scikit-learn computes what it has a
name for, but for ranks of many classes (`_rank`). `targets` are class indices `int[N]` for a model with one
label per image, or a 0/1 matrix `[N, C]` for a multi-label one: that is how every function here tells the two
apart. A number which the data does not define (the ROC-AUC of a class that never occurs) is left out, or NaN
in per-class arrays; it is never quietly zero.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special, stats
from sklearn import metrics as sk

Array = npt.NDArray[Any]

ECE_BINS = 15
"""Equal-width confidence bins of the calibration error, as in Guo et al. 2017, section 2."""
ACCURACY_AT = (3, 5)
LABEL_GIVEN = 0.5
"""Probability from which a label of a multi-label model counts as given, whatever its threshold."""
CONFIDENCE = 0.95
DRAWS = 200
"""Bootstrap resamples: a standard error from 200 is itself within 5 %."""


def probabilities(logits_nc: Array, *, temperature: float = 1.0, multi_label: bool = False) -> Array:
    """Softmax (or sigmoid) of `logits / temperature`, in the dtype of the logits."""
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    scaled_nc = logits_nc / np.asarray(temperature, logits_nc.dtype)
    return np.asarray(special.expit(scaled_nc) if multi_label else special.softmax(scaled_nc, axis=1))


def classification(logits_nc: Array, targets: Array) -> dict[str, float]:
    """Every overall number for raw logits: `single_label` or `multi_label`, by the rank of `targets`."""
    if targets.ndim == 2:
        return multi_label(probabilities(logits_nc, multi_label=True), targets)
    return single_label(probabilities(logits_nc), targets)


def single_label(probabilities_nc: Array, targets: Array) -> dict[str, float]:
    """Overall numbers of a one-label-per-image model; macro averages run over the classes that occur.

    `targets` are class indices. An accuracy@k with k beyond the number of classes is left out.
    """
    check_aligned(probabilities_nc, targets)
    n_classes = probabilities_nc.shape[1]
    predicted = probabilities_nc.argmax(axis=1)
    occurring = np.unique(targets)
    macro: dict[str, Any] = {"labels": occurring, "average": "macro", "zero_division": 0}
    numbers = {
        "accuracy": sk.accuracy_score(targets, predicted),
        **{f"accuracy@{k}": accuracy_at(probabilities_nc, targets, k) for k in ACCURACY_AT if k < n_classes},
        "balanced_accuracy": sk.recall_score(targets, predicted, **macro),
        "precision_macro": sk.precision_score(targets, predicted, **macro),
        "f1_macro": sk.f1_score(targets, predicted, **macro),
        "f1_weighted": sk.f1_score(targets, predicted, **{**macro, "average": "weighted"}),
        "mcc": sk.matthews_corrcoef(targets, predicted),
        "log_loss": sk.log_loss(targets, probabilities_nc, labels=np.arange(n_classes)),
        "ece": calibration_error(probabilities_nc, targets),
        "ece_classwise": classwise_error(probabilities_nc, targets),
        **_ranking(probabilities_nc, indicator(targets, n_classes)),
    }
    return {name: float(value) for name, value in numbers.items()}


def multi_label(probabilities_nc: Array, targets_nc: Array) -> dict[str, float]:
    """Overall numbers of a multi-label model, which gives a label from a probability of `LABEL_GIVEN`.

    `map` is the mean over classes of the average precision.
    """
    check_aligned(probabilities_nc, targets_nc)
    given_nc = probabilities_nc >= LABEL_GIVEN
    occurring = np.flatnonzero(targets_nc.any(axis=0))
    macro: dict[str, Any] = {"labels": occurring, "average": "macro", "zero_division": 0}
    micro: dict[str, Any] = {"average": "micro", "zero_division": 0}
    ranking = _ranking(probabilities_nc, targets_nc)
    numbers = {
        **({"map": ranking["pr_auc_macro"]} if ranking else {}),
        "f1_micro": sk.f1_score(targets_nc, given_nc, **micro),
        "f1_macro": sk.f1_score(targets_nc, given_nc, **macro) if occurring.size else 0.0,
        "precision_micro": sk.precision_score(targets_nc, given_nc, **micro),
        "recall_micro": sk.recall_score(targets_nc, given_nc, **micro),
        "exact_match": (given_nc == targets_nc.astype(bool)).all(axis=1).mean(),
        "log_loss": sk.log_loss(targets_nc.ravel(), probabilities_nc.ravel(), labels=[0, 1]),
        "ece": calibration_error(probabilities_nc, targets_nc),
        "ece_classwise": classwise_error(probabilities_nc, targets_nc),
        **ranking,
    }
    return {name: float(value) for name, value in numbers.items()}


def accuracy_at(scores_nc: Array, targets: Array, k: int) -> float:
    """Share of rows whose true class is among the k best scores; ties go to the lower class index.

    Not `top_k_accuracy_score`: it refuses two classes with two columns of scores.
    """
    true_n1 = np.take_along_axis(scores_nc, targets[:, None], axis=1)
    earlier_nc = np.arange(scores_nc.shape[1]) < targets[:, None]
    better = ((scores_nc > true_n1) | ((scores_nc == true_n1) & earlier_nc)).sum(axis=1)
    return float((better < k).mean())


def indicator(targets: Array, n_classes: int) -> Array:
    """Targets as a 0/1 matrix `uint8[N, C]`; one that is a matrix already comes back as it is."""
    if targets.ndim == 2:
        return targets
    targets_nc = np.zeros((len(targets), n_classes), np.uint8)
    targets_nc[np.arange(len(targets)), targets] = 1
    return targets_nc


def _ranking(scores_nc: Array, targets_nc: Array) -> dict[str, float]:
    """Threshold-free numbers, one class against the rest; empty when no class both occurs and is absent."""
    usable = rankable(targets_nc)
    if not usable.size:
        return {}
    roc, average_precision = ranking_per_class(scores_nc, targets_nc)
    roc_micro, average_precision_micro = _rank(scores_nc.ravel(), targets_nc.ravel())
    return {
        "roc_auc_macro": float(roc[usable].mean()),
        "pr_auc_macro": float(average_precision[usable].mean()),
        "roc_auc_micro": roc_micro,
        "pr_auc_micro": average_precision_micro,
    }


def rankable(targets_nc: Array) -> Array:
    """Indices of the classes that some rows have and some have not."""
    positives = targets_nc.sum(axis=0, dtype=np.int64)
    return np.flatnonzero((positives > 0) & (positives < len(targets_nc)))


def ranking_per_class(scores_nc: Array, targets_nc: Array) -> tuple[Array, Array]:
    """ROC-AUC and average precision of each class against the rest, `float[C]` each; NaN where undefined."""
    roc = np.full(scores_nc.shape[1], np.nan)
    average_precision = roc.copy()
    for c in rankable(targets_nc):
        roc[c], average_precision[c] = _rank(scores_nc[:, c], targets_nc[:, c])
    return roc, average_precision


def _rank(scores: Array, targets: Array) -> tuple[float, float]:
    """ROC-AUC and average precision of one class, equal to scikit-learn's, from one sort of its scores.

    scikit-learn sorts indices once for each of the two and builds whole curves: ten times the time, which
    is spent after each epoch on every class. `targets` are 0/1 and hold both.
    """
    ordered = np.sort(scores)
    positives = np.sort(scores[targets.astype(bool)])
    n, n_positive = len(ordered), len(positives)
    below = np.searchsorted(ordered, positives, side="left")
    rank = (below + np.searchsorted(ordered, positives, side="right") + 1) / 2  # ties share their mean rank
    roc = (rank.sum() - n_positive * (n_positive + 1) / 2) / (n_positive * (n - n_positive))
    precision = (n_positive - np.searchsorted(positives, positives, side="left")) / (n - below)
    return float(roc), float(precision.mean())


@dataclass(frozen=True)
class Reliability:
    """Confidence against outcome in equal-width bins, empty bins left out; each array is `[bins]`."""

    confidence: Array
    """Mean confidence of the bin's predictions."""
    frequency: Array
    """Share of them that are right."""
    count: Array
    """How many they are."""

    @property
    def error(self) -> float:
        """Expected calibration error: the mean of |frequency - confidence| over predictions."""
        return float(np.average(np.abs(self.frequency - self.confidence), weights=self.count))


def reliability(probabilities_nc: Array, targets: Array) -> Reliability:
    """Bin the confidence of the best class (multi-label: of every class) and count how often it is right.

    Not `sklearn.calibration.calibration_curve`: it does not return the counts that the error needs.
    """
    if targets.ndim == 2:
        return binned(probabilities_nc.ravel(), targets.ravel())
    return binned(probabilities_nc.max(axis=1), probabilities_nc.argmax(axis=1) == targets)


def binned(confidence: Array, right: Array, bins: int = ECE_BINS) -> Reliability:
    """Confidence in equal-width bins, and how often it is right in each."""
    confidence = confidence.astype(np.float64)
    which = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    count = np.bincount(which, minlength=bins)
    filled = count > 0
    sums = [np.bincount(which, weights=values, minlength=bins)[filled] for values in (confidence, right)]
    return Reliability(sums[0] / count[filled], sums[1] / count[filled], count[filled])


def class_errors(probabilities_nc: Array, targets: Array) -> Array:
    """Expected calibration error of each class's own probability, `float[C]`; NaN for a class that is absent.

    The error of the best label does not see a rare class (Kull et al. 2019, section 2).
    """
    targets_nc = indicator(targets, probabilities_nc.shape[1])
    found = np.full(probabilities_nc.shape[1], np.nan)
    for c in np.flatnonzero(targets_nc.any(axis=0)):
        found[c] = binned(probabilities_nc[:, c], targets_nc[:, c]).error
    return found


def classwise_error(probabilities_nc: Array, targets: Array) -> float:
    """Class-wise calibration error: the mean of `class_errors` over the classes that occur."""
    errors = class_errors(probabilities_nc, targets)
    return float(np.nanmean(errors)) if np.isfinite(errors).any() else 0.0


def calibration_error(probabilities_nc: Array, targets: Array) -> float:
    """Expected calibration error of the best class (multi-label: of every class), in `ECE_BINS` bins."""
    return reliability(probabilities_nc, targets).error


@dataclass(frozen=True)
class PerClass:
    """One-against-the-rest counts of each class and what follows from them; each array is `[C]`.

    The intervals are `[C, 2]`, 95 % Wilson; precision, recall and F1 are NaN where nothing defines them.
    """

    support: Array
    """Rows that have the class."""
    given: Array
    """Rows that were given the class."""
    correct: Array
    """Rows where both hold."""

    @property
    def precision(self) -> Array:
        return _ratio(self.correct, self.given)

    @property
    def recall(self) -> Array:
        return _ratio(self.correct, self.support)

    @property
    def f1(self) -> Array:
        return _ratio(2 * self.correct, self.given + self.support)

    @property
    def precision_interval(self) -> Array:
        return wilson(self.correct, self.given)

    @property
    def recall_interval(self) -> Array:
        return wilson(self.correct, self.support)

    @property
    def f1_interval(self) -> Array:
        """Through F1 = 2J / (1 + J), J = correct / (given + support - correct) being a proportion.

        The "Wilson indirect" interval of Lam, Gopal and Qian 2023 (arXiv 2309.14621).
        """
        jaccard = wilson(self.correct, self.given + self.support - self.correct)
        return np.asarray(2 * jaccard / (1 + jaccard))


def per_class(given: Array, targets: Array, n_classes: int) -> PerClass:
    """Count each class: `given` and `targets` are both class indices, or both 0/1 matrices."""
    given_nc, targets_nc = (indicator(labels, n_classes) > 0 for labels in (given, targets))
    support, chosen, correct = (nc.sum(axis=0) for nc in (targets_nc, given_nc, given_nc & targets_nc))
    return PerClass(support, chosen, correct)


def coverage_curve(scores: Array, right: Array, *, points: int) -> dict[str, list[float]]:
    """What a threshold costs: per falling threshold, the share of rows answered and of those right.

    One answer per row: its score and whether it is right. At most `points` thresholds, evenly by coverage.
    """
    order = np.argsort(-scores, kind="stable")
    last_of_equals = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    keep = last_of_equals[thin(len(last_of_equals), points)]
    precision = np.cumsum(right[order])[keep] / (keep + 1)
    return {
        "threshold": scores[order][keep].astype(float).tolist(),
        "coverage": ((keep + 1) / len(scores)).tolist(),
        "precision": precision.tolist(),
    }


def likely_labels(scores_nc: Array, targets_nc: Array, *, multi_label: bool) -> Array:
    """0/1 [n, classes]: the labels that images probably have.

    Confident learning (Northcutt, Jiang and Chuang 2021, section 3.1): an image counts for a class when its
    probability is at least the mean one of the images labelled so. Several labels: class by class.
    """
    own_nc, scores_nc = targets_nc > 0, scores_nc.astype(np.float64)
    with np.errstate(invalid="ignore"):  # a class without images has no mean, and nothing counts for it
        present_nc = scores_nc >= (scores_nc * own_nc).sum(axis=0) / own_nc.sum(axis=0)
        absent_nc = scores_nc <= (scores_nc * ~own_nc).sum(axis=0) / (~own_nc).sum(axis=0)
    if multi_label:
        return np.where(present_nc == absent_nc, own_nc, present_nc).astype(np.uint8)
    best = np.where(present_nc, scores_nc, -1.0).argmax(axis=1)
    likely = np.where(present_nc.any(axis=1), best, targets_nc.argmax(axis=1))
    return indicator(likely, targets_nc.shape[1])


def wilson(successes: Array, trials: Array) -> Array:
    """Wilson score interval of each proportion, `float[..., 2]`; NaN where there was no trial.

    Wilson 1927, without continuity correction; `scipy.stats.binomtest` gives the same, one at a time.
    """
    z = stats.norm.ppf(0.5 + CONFIDENCE / 2)
    n = np.where(np.asarray(trials) > 0, trials, np.nan)
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return np.stack([np.maximum(centre - half, 0), np.minimum(centre + half, 1)], axis=-1)


def macro_intervals(given_nc: Array, targets_nc: Array) -> dict[str, list[float]]:
    """Bootstrap intervals of macro precision, recall and F1 over the classes that occur: mean +- z errors.

    Both arrays are 0/1 `[N, C]`. An image counts as often as it was drawn, so one matrix product per
    count serves all resamples. Recall of a class that a resample misses is left out of its average. Not
    quantiles of the resamples: those lack images of rare classes, so they are below what was measured.
    """
    occurring = targets_nc.any(axis=0)
    given = given_nc[:, occurring].astype(np.float32)
    truth = targets_nc[:, occurring].astype(np.float32)
    n = len(truth)
    times_dn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(np.float32)
    times_dn = np.concatenate([np.ones((1, n), np.float32), times_dn])  # first the images as they are
    correct, chosen, support = times_dn @ (given * truth), times_dn @ given, times_dn @ truth
    averages = {
        "precision_macro": np.mean(correct / np.maximum(chosen, 1), axis=1),
        "balanced_accuracy": np.nanmean(correct / np.where(support > 0, support, np.nan), axis=1),
        "f1_macro": np.mean(2 * correct / np.maximum(chosen + support, 1), axis=1),
    }
    return {name: _normal(values[0], values[1:].std(ddof=1)) for name, values in averages.items()}


def _normal(mean: float, error: float) -> list[float]:
    """The interval of a share in [0, 1] from its standard error."""
    half = float(stats.norm.ppf(0.5 + CONFIDENCE / 2) * error)
    return [max(float(mean) - half, 0.0), min(float(mean) + half, 1.0)]


def thin(length: int, points: int) -> Array:
    """Indices of at most `points` of `length` entries, evenly spread, first and last among them."""
    return np.unique(np.linspace(0, length - 1, min(length, points)).round().astype(np.int64))


def check_aligned(scores_nc: Array, targets: Array) -> None:
    """Raise ValueError when the targets cannot belong to the scores."""
    if not len(scores_nc):
        raise ValueError("0 images to measure; at least 1 is needed: check the split and its labels")
    expected = scores_nc.shape if targets.ndim == 2 else scores_nc.shape[:1]
    if targets.shape != expected:
        raise ValueError(f"targets have shape {targets.shape}; scores of {scores_nc.shape} need {expected}")


def _ratio(part: Array, whole: Array) -> Array:
    return part / np.where(whole > 0, whole, np.nan)
