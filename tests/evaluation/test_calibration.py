"""Temperatures and thresholds: recovered from data that was drawn with known ones."""

from dataclasses import dataclass

import numpy as np
import pytest

from pipelines.evaluation import calibration, metrics


@dataclass(frozen=True)
class Family:
    """Classes 0 and 1 below one parent, class 2 alone: the smallest tree with something to roll up."""

    ids: tuple[str, ...] = ("0", "1", "v9i3On", "parent")

    def apply(self, probabilities_nc: np.ndarray, *, multi_label: bool = False) -> np.ndarray:
        joined = np.max if multi_label else np.sum
        return np.column_stack([probabilities_nc, joined(probabilities_nc[:, :2], axis=1)])


def draw(n: int, *, n_classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax is exactly the probability of the drawn labels."""
    rng = np.random.default_rng(seed)
    logits_nc = rng.normal(scale=2, size=(n, n_classes)).astype(np.float32)
    gumbel_nc = rng.gumbel(size=logits_nc.shape)
    return logits_nc, (logits_nc + gumbel_nc).argmax(axis=1)


def test_temperature_undoes_an_overconfident_model() -> None:
    logits_nc, targets = draw(20_000)
    temperature = calibration.fit_temperature(logits_nc * 3, targets)
    assert temperature == pytest.approx(3, rel=0.05)
    calibrated_nc = metrics.probabilities(logits_nc * 3, temperature=temperature)
    assert metrics.calibration_error(calibrated_nc, targets) < 0.02
    assert metrics.calibration_error(metrics.probabilities(logits_nc * 3), targets) > 0.1


def test_temperature_of_a_multi_label_model_fits_its_sigmoids() -> None:
    rng = np.random.default_rng(0)
    logits_nc = rng.normal(scale=2, size=(5_000, 4))
    targets_nc = (rng.random(logits_nc.shape) < metrics.probabilities(logits_nc, multi_label=True)).astype(
        int
    )
    assert calibration.fit_temperature(logits_nc * 2.5, targets_nc) == pytest.approx(2.5, rel=0.05)


def test_a_perfect_model_gets_a_finite_temperature() -> None:
    low, high = calibration.TEMPERATURE_RANGE
    assert low <= calibration.fit_temperature(np.eye(4) * 50, np.arange(4)) <= high


def test_thresholds_keep_their_precision_on_new_images() -> None:
    logits_nc, targets = draw(5_000)
    thresholds = calibration.fit_thresholds(metrics.probabilities(logits_nc), targets, Family())
    assert list(thresholds) == ["0", "1", "v9i3On", "parent"]
    unseen_nc, truth = draw(50_000, seed=1)
    scores_nc = Family().apply(metrics.probabilities(unseen_nc))
    for c, node_id in enumerate(("0", "1", "v9i3On")):
        passing = scores_nc[:, c] >= thresholds[node_id]
        assert (truth[passing] == c).mean() == pytest.approx(0.9, abs=0.03)
    assert np.isin(truth[scores_nc[:, 3] >= thresholds["parent"]], [0, 1]).mean() == pytest.approx(
        0.9, abs=0.03
    )


def test_a_parent_passes_more_easily_than_its_children() -> None:
    logits_nc, targets = draw(5_000)
    scores_nc = metrics.probabilities(logits_nc)
    thresholds = calibration.fit_thresholds(scores_nc, targets, Family())
    passing = Family().apply(scores_nc) >= np.array(list(thresholds.values()))
    assert passing[:, 3].sum() > passing[:, 0].sum() + passing[:, 1].sum()


def test_a_category_that_is_never_right_often_enough_is_never_published() -> None:
    rng = np.random.default_rng(0)
    scores_nc = metrics.probabilities(rng.normal(size=(500, 3)))
    thresholds = calibration.fit_thresholds(
        scores_nc, rng.integers(0, 2, 500), Family(), target_precision=0.95
    )
    assert thresholds["v9i3On"] == calibration.NEVER > 1
    assert thresholds["0"] == calibration.NEVER


def test_a_handful_of_lucky_images_sets_no_threshold() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.2, 0.1, 0.05])
    truth = np.array([True, True, False, False, True, False])
    lucky = calibration.lowest_threshold(scores, truth, target_precision=1.0, min_images=1)
    assert lucky == pytest.approx(0.8)
    assert (
        calibration.lowest_threshold(scores, truth, target_precision=1.0, min_images=3) == calibration.NEVER
    )


def test_multi_label_thresholds_are_fitted_per_label() -> None:
    rng = np.random.default_rng(0)
    logits_nc = rng.normal(scale=2, size=(4_000, 3))
    scores_nc = metrics.probabilities(logits_nc, multi_label=True)
    targets_nc = (rng.random(scores_nc.shape) < scores_nc).astype(int)
    thresholds = calibration.fit_thresholds(scores_nc, targets_nc, Family(), target_precision=0.8)
    for c, node_id in enumerate(("0", "1", "v9i3On")):
        passing = scores_nc[:, c] >= thresholds[node_id]
        assert 0.8 <= targets_nc[passing, c].mean() < 0.82


def test_a_precision_beyond_one_is_refused_with_its_limit() -> None:
    logits_nc, targets = draw(20)
    with pytest.raises(ValueError, match=r"target_precision is 90.*at most 1"):
        calibration.fit_thresholds(logits_nc, targets, Family(), target_precision=90)
