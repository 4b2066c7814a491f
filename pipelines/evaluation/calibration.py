"""Turn validation logits into a temperature and into per-category thresholds; never fitted on the test split.

The temperature makes a probability of 0.8 right four times in five; a threshold says from which probability
on a category may be published at a target precision. Both are data beside the model: the exported graph
divides by the temperature, the bundle carries the thresholds.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from scipy import optimize, special
from sklearn import metrics as sk

from pipelines.evaluation.metrics import Array, check_aligned, indicator

TEMPERATURE_RANGE = (0.05, 20.0)
"""Where the temperature is looked for; a fit at the edge means that the logits carry no information."""

NEVER = 2.0
"""Threshold of a category that never reaches the target precision: above every probability, valid JSON."""


class RollsUp(Protocol):
    """What is needed of `taxonomy.Rollup`: class scores in, scores of every class and ancestor out."""

    @property
    def ids(self) -> Sequence[str]: ...

    def apply(self, probabilities_nc: Array, *, multi_label: bool = False) -> Array: ...


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
    probabilities_nc: Array,
    targets: Array,
    rollup: RollsUp,
    *,
    target_precision: float = 0.9,
    min_images: int = 5,
) -> dict[str, float]:
    """For every class and ancestor id, the lowest probability from which on it is right often enough.

    The probabilities are calibrated ones. A category counts as true where a class below it is. One that
    reaches `target_precision` on no group of at least `min_images` images gets `NEVER`, so that it is
    left out rather than guessed. The lowest of many candidates is biased upward: with 20 validation images
    per class the precision on new images came out at 0.85 for a target of 0.9 (simulated, 300 classes), with
    100 at 0.90. The evaluation therefore measures it again on the test split.
    """
    check_aligned(probabilities_nc, targets)
    if not 0 < target_precision <= 1:
        raise ValueError(f"target_precision is {target_precision}; it must be above 0 and at most 1")
    targets_nc = indicator(targets, probabilities_nc.shape[1]).astype(np.float32)
    scores_nc = rollup.apply(probabilities_nc, multi_label=targets.ndim == 2)
    truth_nc = rollup.apply(targets_nc, multi_label=True) > 0
    return {
        node_id: lowest_threshold(scores, truth, target_precision=target_precision, min_images=min_images)
        for node_id, scores, truth in zip(rollup.ids, scores_nc.T, truth_nc.T, strict=True)
    }


def lowest_threshold(scores: Array, truth: Array, *, target_precision: float, min_images: int) -> float:
    """The lowest score t such that, of the at least `min_images` rows with `score >= t`, enough are true."""
    if not truth.any():
        return NEVER
    precision, _, thresholds = sk.precision_recall_curve(truth, scores)
    passing = len(scores) - np.searchsorted(np.sort(scores), thresholds)
    good = np.flatnonzero((precision[:-1] >= target_precision) & (passing >= min_images))
    return float(thresholds[good[0]]) if good.size else NEVER
