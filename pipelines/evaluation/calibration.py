"""Turn validation logits into a temperature and into per-category thresholds; never fitted on the test split.

The temperature makes a probability of 0.8 right four times in five; a threshold says from which probability
on a category may be published at a target precision. Neither changes the weights: the exported graph divides
by the temperature, the bundle carries the thresholds.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import optimize, special, stats
from sklearn import metrics as sk

from pipelines.evaluation.metrics import Array, check_aligned, indicator
from pipelines.taxonomy.taxonomy import Rollup

TEMPERATURE_RANGE = (0.05, 20.0)
"""Where the temperature is looked for; a fit at the edge means that the logits carry no information."""

NEVER = 2.0
"""Threshold of a category that never reaches the target precision: above every probability, valid JSON."""


MIN_IMAGES = 5
"""Fewer images above a threshold say nothing of its precision."""
PRIOR_IMAGES = 20
"""Images that the calibrated probabilities count for, added to the counted ones. Without them 20 validation
images per class let no category through at a confidence of 0.9; with them the precision on new images is
kept too, also where the probabilities of classes are off by a factor of 1.35 (simulated)."""
MOST_TIMES_THE_IMAGES = 50
"""Beyond so many times the validation images a category is said to need a better model."""
_CHUNK = 256


@dataclass(frozen=True)
class ThresholdRule:
    """What a threshold is to achieve on new images."""

    goal: Literal["precision", "recall", "f1"] = "precision"
    target_precision: float = 0.9
    target_recall: float = 0.9
    confidence: float = 0.9
    """How sure it must be that the precision is reached."""


def fit_temperature(logits_nc: Array, targets: Array) -> float:
    """The temperature with the lowest negative log likelihood (Guo et al. 2017, section 4.2).

    `targets` are class indices, or a 0/1 matrix for a multi-label model (one temperature for all sigmoids).
    """
    check_aligned(logits_nc, targets)
    logits_nc = logits_nc.astype(np.float64)
    likelihood = _multi_label_nll if targets.ndim == 2 else _single_label_nll
    found = optimize.minimize_scalar(
        lambda log_t: likelihood(logits_nc * np.exp(-log_t), targets),
        bounds=tuple(np.log(TEMPERATURE_RANGE)),
        method="bounded",
    )
    return float(np.exp(found.x))


def _single_label_nll(logits_nc: Array, targets: Array) -> float:
    log_likelihood_nc = special.log_softmax(logits_nc, axis=1)
    return float(-log_likelihood_nc[np.arange(len(targets)), targets].mean())


def _multi_label_nll(logits_nc: Array, targets_nc: Array) -> float:
    # log(1 + exp(x)) - x*y is the cross entropy of a sigmoid without ever taking log(0).
    return float((np.logaddexp(0, logits_nc) - logits_nc * targets_nc).mean())


def fit_thresholds(
    probabilities_nc: Array, targets: Array, rollup: Rollup, rule: ThresholdRule = ThresholdRule()
) -> dict[str, float]:
    """The threshold of every class and ancestor id that the rule asks for.

    The probabilities are calibrated ones. A category counts as true where a class below it is. One that never
    reaches the precision gets `NEVER`, so that it is left out rather than guessed.
    """
    return {
        node_id: fit_threshold(scores, truth, rule)
        for node_id, scores, truth in _by_category(probabilities_nc, targets, rollup)
    }


def images_needed(
    probabilities_nc: Array, targets: Array, rollup: Rollup, rule: ThresholdRule = ThresholdRule()
) -> dict[str, int | None]:
    """For each category that gets `NEVER`: how many more validation images of it would let it pass.

    Supposing that they look like those there are; None where a better model is needed instead.
    """
    return {
        node_id: _more_images(scores, truth, rule)
        for node_id, scores, truth in _by_category(probabilities_nc, targets, rollup)
        if fit_threshold(scores, truth, rule) == NEVER
    }


def _by_category(probabilities_nc: Array, targets: Array, rollup: Rollup) -> list[tuple[str, Array, Array]]:
    """Id, scores and truth of every class and ancestor."""
    check_aligned(probabilities_nc, targets)
    targets_nc = indicator(targets, probabilities_nc.shape[1]).astype(np.float32)
    scores_nc = rollup.apply(probabilities_nc, multi_label=targets.ndim == 2)
    truth_nc = rollup.apply(targets_nc, multi_label=True) > 0
    return list(zip(rollup.ids, scores_nc.T, truth_nc.T, strict=True))


def fit_threshold(scores: Array, truth: Array, rule: ThresholdRule) -> float:
    """One category's threshold; `NEVER` where the goal cannot be reached."""
    if not truth.any():
        return NEVER
    if rule.goal == "precision":
        return lowest_precise(Ranked.of(scores, truth), rule)
    precision, recall, thresholds = sk.precision_recall_curve(truth, scores)
    if rule.goal == "recall":
        return float(thresholds[np.flatnonzero(recall[:-1] >= rule.target_recall)[-1]])
    f1 = 2 * precision[:-1] * recall[:-1] / np.maximum(precision[:-1] + recall[:-1], 1e-12)
    return float(thresholds[f1.argmax()])


@dataclass(frozen=True)
class Ranked:
    """What is above each candidate threshold, the highest first; each array is `[candidates]`."""

    threshold: Array
    count: Array
    """Images at or above it."""
    right: Array
    """Those of them that have the category."""
    expected: Array
    """Their mean probability."""

    @classmethod
    def of(cls, scores: Array, truth: Array) -> "Ranked":
        order = np.argsort(-scores, kind="stable")
        ranked = scores[order].astype(np.float64)
        last = np.flatnonzero(np.append(np.diff(ranked) != 0, True))
        count = last + 1.0
        expected = np.clip(np.cumsum(ranked)[last] / count, 1e-6, 1 - 1e-6)
        return cls(ranked[last], count, np.cumsum(truth[order])[last].astype(np.float64), expected)


def lowest_precise(ranked: Ranked, rule: ThresholdRule, *, times: float = 1.0) -> float:
    """The lowest threshold whose precision reaches the target at the rule's confidence.

    The precision has a beta posterior: the counted images, and `PRIOR_IMAGES` that are right as often as
    their calibrated probabilities say. Its lower bound must reach the target.

    Args:
        times: as if there were so many times the images.
    """
    right = times * ranked.right + PRIOR_IMAGES * ranked.expected
    wrong = times * (ranked.count - ranked.right) + PRIOR_IMAGES * (1 - ranked.expected)
    # The bound is far slower than these two, which hold wherever it does.
    likely = right / (right + wrong) >= rule.target_precision - 0.02
    candidates = np.flatnonzero(likely & (times * ranked.count >= MIN_IMAGES))[::-1]
    for start in range(0, len(candidates), _CHUNK):
        some = candidates[start : start + _CHUNK]
        lower = stats.beta.ppf(1 - rule.confidence, right[some], wrong[some])
        good = np.flatnonzero(lower >= rule.target_precision)
        if good.size:
            return float(ranked.threshold[some[good[0]]])
    return NEVER


def _more_images(scores: Array, truth: Array, rule: ThresholdRule) -> int | None:
    ranked = Ranked.of(scores, truth)
    for times in (1.5, 2, 3, 5, 10, 20, MOST_TIMES_THE_IMAGES):
        if truth.any() and lowest_precise(ranked, rule, times=times) != NEVER:
            return math.ceil((times - 1) * int(truth.sum()))
    return None
