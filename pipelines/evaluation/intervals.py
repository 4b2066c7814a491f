"""Turn counts of a test into how sure they are: 95 % intervals of shares and of averages over classes.

A share of images has Wilson's closed form; an average over classes has none, so it is bootstrapped over
images. Pure arithmetic on counts.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[Any]

CONFIDENCE = 0.95
DRAWS = 200
"""Bootstrap resamples: a standard error from 200 is itself within 5 %."""


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


def macro(given_nc: Array, targets_nc: Array, *, draws: int = DRAWS, seed: int = 0) -> dict[str, list[float]]:
    """Bootstrap intervals of macro precision, recall and F1 over the classes that occur: mean +- z errors.

    Both arrays are 0/1 `[N, C]`. An image counts as often as it was drawn, so one matrix product per
    count serves all resamples. Recall of a class that a resample misses is left out of its average. Not
    quantiles of the resamples: those lack images of rare classes, so they lie below what was measured.
    """
    occurring = targets_nc.any(axis=0)
    given = given_nc[:, occurring].astype(np.float32)
    truth = targets_nc[:, occurring].astype(np.float32)
    n = len(truth)
    times_dn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float32)
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
