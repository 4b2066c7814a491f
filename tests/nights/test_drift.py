"""Drift is raised where labels moved, named by category, and not by chance."""

import numpy as np
import pytest
from scipy import stats

from pipelines.nights import drift
from pipelines.nights.drift import Level, Signal

SHARES = np.append(np.linspace(0.01, 0.05, 36) / np.linspace(0.01, 0.05, 36).sum() * 0.95, 0.05)
"""37 categories, the last with 5 %."""


def counts(rng: np.random.Generator, n: int, shares: np.ndarray = SHARES) -> dict[str, int]:
    return {str(at): int(images) for at, images in enumerate(rng.multinomial(n, shares)) if images}


def signal(rng: np.random.Generator, n: int, shares: np.ndarray = SHARES, *, nights: int = 7) -> Signal:
    return Signal("tier 1", counts(rng, n, shares), [counts(rng, n) for _ in range(nights)])


@pytest.mark.parametrize("n", [200, 1_000, 5_000, 100_000])
def test_nights_without_drift_raise_nothing(n):
    """500 nights at each size: at most 1 % of them raise any level; naive PSI raises 95 % at 500 images."""
    rng = np.random.default_rng(n)
    raised = sum(drift.highest(drift.judge([signal(rng, n)])) > Level.none for _ in range(500))
    assert raised <= 5


def test_category_that_doubles_among_2000_images_is_found_and_named():
    rng = np.random.default_rng(0)
    after = np.append(SHARES[:36] / 0.95 * 0.9, 0.1)
    found = [drift.judge([signal(rng, 2_000, after, nights=3)])[0] for _ in range(200)]
    named = [one.level >= Level.notice and one.movers[0].id == "36" for one in found]
    assert sum(named) >= 198
    assert found[0].movers[0].images > 1.5 * found[0].movers[0].expected


def test_complete_change_is_an_alarm_also_of_few_images():
    past = [{"sports": 500, "food": 500}] * 3
    found = drift.judge([Signal("tier 1", {"pets": 150}, past)])[0]
    assert found.level is Level.alarm
    assert found.movers[0].id == "pets"


def test_tiny_but_certain_change_of_many_images_raises_nothing():
    """The p-value alone would: 0.5 points of a million images."""
    past = [{"sports": 500_000, "food": 500_000}] * 3
    found = drift.judge([Signal("tier 1", {"sports": 505_000, "food": 495_000}, past)])[0]
    assert found.p < 1e-10
    assert found.level is Level.none


def test_too_few_images_are_not_judged():
    few = Signal("tier 1", {"sports": 49}, [{"food": 5_000}])
    first_night = Signal("tier 1", {"sports": 5_000}, [])
    for found in drift.judge([few, first_night]):
        assert not found.is_judged
        assert found.level is Level.none


def test_pictures_in_series_raise_nothing():
    """Each draw is a series of 20 alike: independent draws would never vary as much."""
    rng = np.random.default_rng(0)

    def series(n: int) -> dict[str, int]:
        return {one: 20 * images for one, images in counts(rng, n // 20).items()}

    nights = [Signal("tier 1", series(4_000), [series(4_000) for _ in range(14)]) for _ in range(200)]
    assert sum(drift.judge([night])[0].level > Level.none for night in nights) <= 4
    assert drift.judge([nights[0]])[0].design_effect == pytest.approx(20, rel=0.4)


def test_pictures_in_series_of_one_page_raise_nothing_on_the_second_night():
    """One past night says nothing of how nights vary, the pages of each do."""
    rng = np.random.default_rng(0)

    def second_night(series_effect: float) -> Signal:
        tonight, past = ({one: 5 * n for one, n in counts(rng, 400).items()} for _ in range(2))
        return Signal("tier 1", tonight, [past], series_effect=series_effect)

    raised = [
        sum(drift.judge([second_night(effect)])[0].level > Level.none for _ in range(200))
        for effect in (1.0, 5.0)
    ]
    assert raised[0] > 100
    assert raised[1] <= 2


def test_series_effect_is_their_length_where_each_is_of_one_category():
    alike = [drift.SeriesCounts(images=30, squares=150, products=150) for _ in range(4)]
    alone = [drift.SeriesCounts(images=30, squares=30, products=30) for _ in range(4)]
    assert drift.find_series_effect(alike) == pytest.approx(5)
    assert drift.find_series_effect(alone) == 1
    assert drift.find_series_effect(alike[:1]) == 1


def test_one_past_night_of_drift_does_not_hide_the_next():
    rng = np.random.default_rng(0)
    moved = np.append(SHARES[:36] / 0.95 * 0.5, 0.5)
    past = [counts(rng, 2_000) for _ in range(9)] + [counts(rng, 2_000, moved)]
    assert drift.judge([Signal("tier 1", counts(rng, 2_000, moved), past)])[0].level is Level.alarm


def test_p_values_are_scipys():
    tonight, past = np.array([30.0, 70.0, 0.0]), np.array([100.0, 900.0, 5.0])
    cells = np.stack([tonight, past])[:, :2]
    assert drift.p_of_cells(cells) == pytest.approx(stats.chi2_contingency(cells, correction=False).pvalue)
    rate = 100 / 1105
    above = stats.binom.sf(29, 130, rate)
    below = stats.binom.cdf(0, 5, rate)
    expected = [2 * above, 2 * min(stats.binom.sf(69, 970, rate), stats.binom.cdf(70, 970, rate)), 2 * below]
    assert drift.p_by_category(tonight, past) == pytest.approx(np.minimum(1, expected))


def test_holm_correction_keeps_order_and_never_lowers():
    assert drift.correct([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert drift.correct([]) == []


def test_rare_categories_share_a_cell():
    pooled = drift.pool_rare(np.array([[50.0, 2.0, 3.0, 45.0], [500.0, 20.0, 50.0, 430.0]]))
    assert pooled.tolist() == [[50, 45, 5], [500, 430, 70]]


def test_too_rare_to_share_a_cell_join_the_smallest():
    pooled = drift.pool_rare(np.array([[50.0, 2.0, 48.0], [500.0, 20.0, 480.0]]))
    assert pooled.tolist() == [[50, 50], [500, 500]]
