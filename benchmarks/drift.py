"""Simulated nights: how often drift is raised where there is none, and found where there is some.

    python benchmarks/drift.py

10,000 nights of 200 to 100,000 new images against 1 to 28 past nights, with 14 signals each (two tiers, best
scores, uncertain, without category, nine publishers); 1,000 such nights whose images come in series of 1, 3
and 5 alike, of one page each, and 1,000 on which nothing says which images are a series; then 2,000 nights of
2,000 images on which one category of 37 goes from 5 % to 10 %. About five minutes; exit code 1 when more than
1 % of the nights without drift are raised at any level (but where the series are not known), or fewer than
99 % of the last are, with the category named.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Literal

import numpy as np

from pipelines.nights import drift
from pipelines.nights.drift import Signal

MOST_FALSE, LEAST_FOUND = 0.01, 0.99
KINDS = {"tier 1": 37, "tier 2": 300, "best score": 10, "uncertain": 2, "without category": 2}
PUBLISHERS = 9
LENGTHS = (1, 3, 5)
"""Images of a series; as many series of each length."""
Series = Literal["none", "known", "unknown"]
"""Whether images come in series, and whether pages say so."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nights", type=int, default=10_000)
    nights = parser.parse_args().nights
    rng = np.random.default_rng(0)
    levels = Counter(drift.highest(drift.judge(quiet_night(rng))).name for _ in range(nights))
    known, unknown = (
        Counter(drift.highest(drift.judge(quiet_night(rng, series))).name for _ in range(nights // 10))
        for series in ("known", "unknown")
    )
    found = sum(is_found(rng) for _ in range(nights // 5))
    false = 1 - levels["none"] / nights
    share = found / (nights // 5)
    print(f"no drift: {dict(levels)} of {nights:,} nights, {100 * false:.2f} % raised")
    print(f"no drift, series by page: {dict(known)} of {nights // 10:,} nights")
    print(f"no drift, series not known: {dict(unknown)} of {nights // 10:,} nights")
    print(f"5 % to 10 % of 2,000: found and named on {100 * share:.2f} % of {nights // 5:,} nights")
    false_of_series = 1 - known["none"] / (nights // 10)
    sys.exit(0 if max(false, false_of_series) <= MOST_FALSE and share >= LEAST_FOUND else 1)


def quiet_night(rng: np.random.Generator, series: Series = "none") -> list[Signal]:
    """A night whose images are drawn as those of the past nights were."""
    n_past = int(rng.integers(1, 29))
    sizes = np.exp(rng.uniform(np.log(200), np.log(100_000), n_past + 1)).astype(int)
    signals = [draw(rng, name, sizes, cells, series) for name, cells in KINDS.items()]
    publishers = [draw(rng, "tier 1", sizes // 4, 37, series) for _ in range(PUBLISHERS)]
    return signals + publishers


def draw(rng: np.random.Generator, name: str, sizes: np.ndarray, cells: int, series: Series) -> Signal:
    """Counts of one night and its past ones from shares as uneven as those of real categories."""
    shares = rng.dirichlet(np.full(cells, rng.choice([0.3, 1.0])))
    lengths = np.array([1] if series == "none" else LENGTHS)
    drawn = [rng.multinomial(int(size) // lengths.sum(), shares, size=len(lengths)) for size in sizes]
    counts = [(lengths[:, None] * night).sum(axis=0) for night in drawn]
    effect = 1.0
    if series == "known":
        squares = [(lengths[:, None] ** 2 * night).sum(axis=0) for night in drawn]
        effects = [find_effect(*both) for both in zip(counts, squares, strict=True)]
        effect = float(np.average(effects, weights=[night.sum() for night in counts]))
    tonight, *past = [name_cells(night) for night in counts]
    return Signal(name, tonight, past, series_effect=effect)


def find_effect(counts: np.ndarray, squares: np.ndarray) -> float:
    """The series effect of series that are each of one cell."""
    seen = counts > 0
    each = zip(counts[seen].tolist(), squares[seen].tolist(), strict=True)
    return drift.find_series_effect([drift.SeriesCounts(n, square, square) for n, square in each])


def name_cells(counts: np.ndarray) -> Mapping[str, int]:
    return {str(cell): int(images) for cell, images in enumerate(counts) if images}


def is_found(rng: np.random.Generator) -> bool:
    """Whether one category of 37 that goes from 5 % to 10 % of 2,000 images is raised and named."""
    n_past = int(rng.integers(1, 29))
    before = np.append(rng.dirichlet(np.ones(36)) * 0.95, 0.05)
    after = np.append(before[:36] / 0.95 * 0.9, 0.1)
    past = [name_cells(rng.multinomial(2000, before)) for _ in range(n_past)]
    moved = Signal("tier 1", name_cells(rng.multinomial(2000, after)), past)
    others = quiet_night(rng)[1:]
    found = drift.judge([moved, *others])[0]
    return found.level >= drift.Level.notice and found.movers[0].id == "36"


if __name__ == "__main__":
    main()
