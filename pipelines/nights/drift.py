"""Counts of tonight's new images against those of past nights -> whether the labels moved, and how far.

Pure: counts in, verdict out. A signal is one way to count images: by category of a tier, by best score, by
whether a category was given. A level needs both a large enough effect and a p-value that excludes chance.

Effect: the population stability index, less what chance alone gives,

    PSI    = sum_k (p_k - q_k) ln(p_k / q_k)        p tonight's shares, q those of the past nights
    excess = PSI - (K - 1) (1/n + 1/m)              n, m images; K cells

(Siddiqi, Credit Risk Scorecards, 2006; its expectation without drift: Yurdakul, dissertation 3208 of Western
Michigan University, 2018). Cells in which fewer than 5 images are expected are one cell (Cochran, Biometrics
10, 1954), and half an image is added to every count, so that no share is zero.

Chance: the smaller p-value of two tests, by Bonferroni with weights of 1 to 9. Pearson's chi-squared test of
homogeneity over the cells finds small changes everywhere. The conditional test of two rates (Przyborowski,
Wilenski, Biometrika 31, 1940) of each category, times their number, finds one that moved, in small counts
too. Over all signals of a night p-values are corrected by Holm's method (Scandinavian Journal of Statistics
6, 1979).

Pictures come in series, so counts of nights vary more than those of independent draws. All counts are divided
by the design effect (Rao and Scott, Journal of the American Statistical Association 76, 1981), the larger of
two estimates. Between nights: chi-squared over its degrees of freedom, each past night against the others, on
average; the highest fifth of the nights is left out, so that a night of drift does not hide the next. Within
nights, which needs no third night: the pictures of one page or folder are a cluster, and the effect is the
variance of the clusters' counts over that of independent draws (Rao and Scott, Biometrics 48, 1992).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = Mapping[str, int]
"""Images by category, or by another cell."""
Array = npt.NDArray[np.float64]

MIN_IMAGES = 50
"""Images of tonight, and of the past nights together, below which nothing is said."""
MIN_NIGHTS = 2
"""Past nights from which the design effect is estimated; with fewer it is 1."""
TRIMMED = 5
"""One night in so many is left out of the design effect, the one that differs most."""
MIN_EXPECTED = 5.0
"""Smallest expected count of a cell of its own."""
MAX_P = 0.005
"""Largest corrected p-value of drift: the share of nights without drift on which any signal is raised."""
CATEGORY_WEIGHT = 0.9
"""Share of the false alarms that the tests of single categories may cause; chi-squared has power enough."""
MAX_P_SERIES = 0.05
"""Largest p-value at which the past nights are taken to differ by more than chance."""
MOVERS = 3
"""Categories named per signal."""


class Level(IntEnum):
    """How far a signal moved; a higher level includes the lower ones."""

    none = 0
    notice = 1
    warning = 2
    alarm = 3


LEAST_EXCESS = {Level.notice: 0.005, Level.warning: 0.1, Level.alarm: 0.25}
"""Excess PSI of each level: 0.1 and 0.25 are the usual limits; one category of 37 that goes from 5 % to 10 %
gives 0.037."""


@dataclass(frozen=True)
class Signal:
    """One way to count images, tonight and on each past night of the same model."""

    name: str
    tonight: Counts
    past: Sequence[Counts]
    segment: str = ""
    """The rows counted, as `publisher=17`; empty for all."""
    series_effect: float = 1.0
    """The design effect of the series within nights."""


@dataclass(frozen=True)
class Mover:
    """One category whose share changed."""

    id: str
    images: int
    """Tonight."""
    expected: float
    """Images tonight at the past nights' share."""
    share: float
    past_share: float
    p: float
    """Of this category alone, uncorrected."""


@dataclass(frozen=True)
class Drift:
    """What is found of one signal."""

    signal: Signal
    n_images: int
    n_past: int
    psi: float
    excess: float
    """PSI less what chance alone gives."""
    p: float
    """Corrected for the number of signals; 1 where too few images were counted."""
    design_effect: float
    movers: tuple[Mover, ...]
    level: Level = Level.none

    @property
    def is_judged(self) -> bool:
        """Whether there are images enough, tonight and before."""
        return has_enough(self.signal)


def judge(signals: Sequence[Signal]) -> list[Drift]:
    """Every signal with its level, in the order given."""
    found = [measure(signal) for signal in signals]
    judged = [at for at, drift in enumerate(found) if drift.is_judged]
    corrected = correct([found[at].p for at in judged])
    for at, p in zip(judged, corrected, strict=True):
        found[at] = replace(found[at], p=p, level=level_of(found[at].excess, p))
    return found


def highest(drifts: Sequence[Drift]) -> Level:
    """The level of a night: the highest of its signals."""
    return max((drift.level for drift in drifts), default=Level.none)


def level_of(excess: float, p: float) -> Level:
    """The highest level whose limits both the effect and the p-value pass."""
    if p > MAX_P:
        return Level.none
    return max((level for level, least in LEAST_EXCESS.items() if excess >= least), default=Level.none)


def correct(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: the chance that any of these is as small without drift stays at or below each."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1, np.maximum.accumulate(np.asarray(p_values)[order] * factors))
    return [float(p) for p in corrected]


def has_enough(signal: Signal) -> bool:
    """Whether a signal can be judged."""
    return sum(signal.tonight.values()) >= MIN_IMAGES and _sum_past(signal) >= MIN_IMAGES


def measure(signal: Signal) -> Drift:
    """The effect and the uncorrected p-value of one signal."""
    if not has_enough(signal):
        n_images = sum(signal.tonight.values())
        return Drift(signal, n_images, _sum_past(signal), 0.0, 0.0, 1.0, 1.0, ())
    ids = sorted({*signal.tonight, *(one for night in signal.past for one in night)})
    tonight = _as_array(signal.tonight, ids)
    nights = np.array([_as_array(night, ids) for night in signal.past])
    past = nights.sum(axis=0)
    n, m = float(tonight.sum()), float(past.sum())
    effect = max(signal.series_effect, find_design_effect(nights))
    cells = pool_rare(np.stack([tonight, past]) / effect)
    cells_p = p_by_category(tonight / effect, past / effect)
    psi = stability_index(cells)
    floor = (cells.shape[1] - 1) * effect * (1 / n + 1 / m)
    p_everywhere = p_of_cells(cells) / (1 - CATEGORY_WEIGHT)
    p_anywhere = len(ids) * float(cells_p.min()) / CATEGORY_WEIGHT
    return Drift(
        signal=signal,
        n_images=int(n),
        n_past=int(m),
        psi=psi,
        excess=psi - floor,
        p=min(1.0, p_everywhere, p_anywhere),
        design_effect=effect,
        movers=_movers(ids, tonight, past, cells_p),
    )


def find_design_effect(nights: Array) -> float:
    """How much more the past nights differ than independent draws would; at least 1.

    Args:
        nights: counts `[nights, categories]`.
    """
    nights = nights[nights.sum(axis=1) >= MIN_IMAGES]
    nights = nights[:, nights.any(axis=0)]
    if len(nights) < MIN_NIGHTS or nights.shape[1] < 2:
        return 1.0
    sizes, total = nights.sum(axis=1, keepdims=True), nights.sum()
    expected = sizes * nights.sum(axis=0) / total
    # Chi-squared against the other nights; its mean is the degrees of freedom, however small the counts are.
    chi_squared = ((nights - expected) ** 2 / expected).sum(axis=1) / (1 - sizes[:, 0] / total)
    kept = np.sort(chi_squared)[: len(nights) - len(nights) // TRIMMED]
    df = len(kept) * (nights.shape[1] - 1)
    differ = chi_squared_p(df, kept.sum()) <= MAX_P_SERIES
    return max(1.0, float(kept.sum() / df)) if differ else 1.0


@dataclass(frozen=True)
class SeriesCounts:
    """The images of one cell of a signal, by the series that they come in."""

    images: int
    squares: int
    """Sum over the series of their images in this cell, squared."""
    products: int
    """Sum over the series of their images in this cell times those in all cells."""


def find_series_effect(cells: Sequence[SeriesCounts]) -> float:
    """How much more counts of whole series vary than independent draws would, on average over the cells.

    1 where every image is a series of its own, m where all series are m images of one cell.
    """
    n = sum(cell.images for cell in cells)
    if len(cells) < 2:
        return 1.0
    squared = sum(n * cell.squares / cell.images - cell.products for cell in cells)
    return max(1.0, squared / (n * (len(cells) - 1)))


def pool_rare(counts: Array) -> Array:
    """Counts `[2, categories]` with those categories in one cell of which too few are expected in either row.

    Which are pooled depends on the sums of the categories alone, so a test given those sums stays valid.
    """
    totals = counts.sum(axis=0)
    smallest_share = counts.sum(axis=1).min() / counts.sum()
    rare = totals * smallest_share < MIN_EXPECTED
    rest = counts[:, rare].sum(axis=1, keepdims=True)
    own = counts[:, ~rare]
    if rest.sum() * smallest_share >= MIN_EXPECTED or not own.size:
        return np.concatenate([own, rest], axis=1)
    least = int(own.sum(axis=0).argmin())  # too few even together: they join the smallest cell
    own[:, least] += rest[:, 0]
    return own


def p_of_cells(cells: Array) -> float:
    """The p-value of Pearson's chi-squared test that both rows of `[2, cells]` have the same shares."""
    return chi_squared_p(cells.shape[1] - 1, _chi_squared(cells)) if cells.shape[1] > 1 else 1.0


def chi_squared_p(df: int, value: float) -> float:
    """The probability of a chi-squared of `df` degrees of freedom above a value."""
    from scipy import special  # a fifth of a second, which the page of a single run does not need

    return float(special.chdtrc(df, value))


def p_by_category(tonight: Array, past: Array) -> Array:
    """Of each category, the two-sided p-value of the test that its rate did not change."""
    from scipy import special

    n, m = tonight.sum(), past.sum()
    both = tonight + past
    above = np.where(tonight > 0, special.betainc(np.maximum(tonight, 1e-9), past + 1, n / (n + m)), 1.0)
    below = np.where(past > 0, special.betainc(np.maximum(past, 1e-9), tonight + 1, m / (n + m)), 1.0)
    return np.where(both > 0, np.minimum(1.0, 2 * np.minimum(above, below)), 1.0)


def stability_index(cells: Array) -> float:
    """The population stability index of `[2, cells]`, half an image added to every cell."""
    smoothed = cells + 0.5
    p, q = smoothed / smoothed.sum(axis=1, keepdims=True)
    return float(((p - q) * np.log(p / q)).sum())


def describe(drift: Drift) -> dict[str, Any]:
    """One signal as the report keeps it."""
    return {
        "signal": drift.signal.name,
        "segment": drift.signal.segment,
        "level": drift.level.name,
        "judged": drift.is_judged,
        "images": drift.n_images,
        "past_images": drift.n_past,
        "past_nights": len(drift.signal.past),
        "psi": round(drift.psi, 5),
        "excess_psi": round(drift.excess, 5),
        "p": drift.p,
        "design_effect": round(drift.design_effect, 3),
        "movers": [vars(mover) for mover in drift.movers],
    }


def _movers(ids: Sequence[str], tonight: Array, past: Array, cells_p: Array) -> tuple[Mover, ...]:
    """The categories that add most to the index, those that moved most first."""
    n, m = tonight.sum(), past.sum()
    p, q = (tonight + 0.5) / (n + len(ids) / 2), (past + 0.5) / (m + len(ids) / 2)
    order = np.argsort(-(p - q) * np.log(p / q), kind="stable")[:MOVERS]
    return tuple(
        Mover(
            id=ids[at],
            images=int(tonight[at]),
            expected=round(float(n * past[at] / m), 1),
            share=float(tonight[at] / n),
            past_share=float(past[at] / m),
            p=float(cells_p[at]),
        )
        for at in order
    )


def _chi_squared(cells: Array) -> float:
    expected = cells.sum(axis=1, keepdims=True) * cells.sum(axis=0) / cells.sum()
    return float(((cells - expected) ** 2 / expected).sum())


def _as_array(counts: Counts, ids: Sequence[str]) -> Array:
    return np.array([counts.get(one, 0) for one in ids], np.float64)


def _sum_past(signal: Signal) -> int:
    return sum(sum(night.values()) for night in signal.past)
