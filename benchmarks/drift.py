"""Simulated nights: how often drift is raised where there is none, and found where there is some.

    python benchmarks/drift.py

10,000 nights of 200 to 100,000 new images against 1 to 28 past nights, with 14 signals each (two tiers, best
scores, uncertain, without category, nine publishers); then 2,000 nights of 2,000 images on which one category
of 37 goes from 5 % to 10 %. About ten minutes; exit code 1 when more than 1 % of the former are raised at any
level, or fewer than 99 % of the latter are, with the category named.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping

import numpy as np

from pipelines.nights import drift
from pipelines.nights.drift import Signal

MOST_FALSE, LEAST_FOUND = 0.01, 0.99
KINDS = {"tier 1": 37, "tier 2": 300, "best score": 10, "uncertain": 2, "without category": 2}
PUBLISHERS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nights", type=int, default=10_000)
    nights = parser.parse_args().nights
    rng = np.random.default_rng(0)
    levels = Counter(drift.highest(drift.judge(quiet_night(rng))).name for _ in range(nights))
    series = Counter(
        drift.highest(drift.judge(quiet_night(rng, series=3.0))).name for _ in range(nights // 10)
    )
    found = sum(is_found(rng) for _ in range(nights // 5))
    false = 1 - levels["none"] / nights
    share = found / (nights // 5)
    print(f"no drift: {dict(levels)} of {nights:,} nights, {100 * false:.2f} % raised")
    print(f"no drift, pictures in series of 3: {dict(series)} of {nights // 10:,} nights")
    print(f"5 % to 10 % of 2,000: found and named on {100 * share:.2f} % of {nights // 5:,} nights")
    sys.exit(0 if false <= MOST_FALSE and share >= LEAST_FOUND else 1)


def quiet_night(rng: np.random.Generator, *, series: float = 1.0) -> list[Signal]:
    """A night whose images are drawn as those of the past nights were.

    Args:
        series: images that come together and are alike; 1 where each is drawn alone.
    """
    n_past = int(rng.integers(1, 29))
    sizes = np.exp(rng.uniform(np.log(200), np.log(100_000), n_past + 1)).astype(int)
    signals = [draw(rng, name, sizes, cells, series) for name, cells in KINDS.items()]
    publishers = [draw(rng, "tier 1", sizes // 4, 37, series) for _ in range(PUBLISHERS)]
    return signals + publishers


def draw(rng: np.random.Generator, name: str, sizes: np.ndarray, cells: int, series: float) -> Signal:
    """Counts of one night and its past ones from shares as uneven as those of real categories."""
    shares = rng.dirichlet(np.full(cells, rng.choice([0.3, 1.0])))
    counts = [(rng.multinomial(int(size / series), shares) * series).astype(int) for size in sizes]
    tonight, *past = [name_cells(night) for night in counts]
    return Signal(name, tonight, past)


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
