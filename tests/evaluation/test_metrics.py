"""The numbers of a report: against scikit-learn, scipy and counts made by hand."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from pipelines.evaluation import metrics


@pytest.fixture
def scored() -> tuple[np.ndarray, np.ndarray]:
    """Logits of 400 images and 5 classes that are mostly right, the last class never true."""
    rng = np.random.default_rng(7)
    targets = rng.integers(0, 4, 400)
    logits_nc = rng.normal(size=(400, 5)).astype(np.float32)
    logits_nc[np.arange(400), targets] += 2
    return logits_nc, targets


@pytest.mark.parametrize("decimals", [8, 1])
def test_ranking_per_class_equals_scikit_learn_with_and_without_ties(decimals: int) -> None:
    random = np.random.default_rng(0)
    scores_nc = random.random((300, 4), np.float32).round(decimals)
    targets_nc = (random.random((300, 4)) < [0.02, 0.2, 0.5, 0.9]).astype(np.uint8)
    roc, average_precision = metrics.ranking_per_class(scores_nc, targets_nc)
    columns = list(zip(targets_nc.T, scores_nc.T, strict=True))
    np.testing.assert_allclose(roc, [sk.roc_auc_score(*column) for column in columns])
    np.testing.assert_allclose(average_precision, [sk.average_precision_score(*column) for column in columns])


def test_accuracy_at_k_counts_the_true_class_among_the_best_k() -> None:
    scores_nc = np.array([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.5, 0.2, 0.3]])
    targets = np.array([0, 0, 1])
    assert metrics.accuracy_at(scores_nc, targets, 1) == pytest.approx(1 / 3)
    assert metrics.accuracy_at(scores_nc, targets, 2) == pytest.approx(2 / 3)


def test_a_model_that_scores_all_classes_alike_gets_no_credit_from_ties() -> None:
    assert metrics.accuracy_at(np.zeros((4, 4)), np.array([0, 1, 2, 3]), 1) == 0.25


def test_single_label_numbers_are_those_of_scikit_learn(scored: tuple[np.ndarray, np.ndarray]) -> None:
    logits_nc, targets = scored
    scores_nc = metrics.probabilities(logits_nc)
    predicted = scores_nc.argmax(axis=1)
    numbers = metrics.classification(logits_nc, targets)
    assert numbers["accuracy"] == sk.accuracy_score(targets, predicted)
    assert numbers["accuracy@3"] == pytest.approx(
        sk.top_k_accuracy_score(targets, scores_nc, k=3, labels=np.arange(5))
    )
    assert numbers["mcc"] == pytest.approx(sk.matthews_corrcoef(targets, predicted))
    one_against_rest = [sk.roc_auc_score(targets == c, scores_nc[:, c]) for c in range(4)]
    assert numbers["roc_auc_macro"] == pytest.approx(np.mean(one_against_rest))


def test_a_class_without_test_images_does_not_pull_the_macro_averages_down(
    scored: tuple[np.ndarray, np.ndarray],
) -> None:
    logits_nc, targets = scored
    numbers = metrics.classification(logits_nc, targets)
    counted = metrics.per_class(logits_nc.argmax(axis=1), targets, 5)
    assert numbers["balanced_accuracy"] == pytest.approx(counted.recall[:4].mean())
    assert np.isnan(counted.recall[4])
    assert counted.given[4] > 0


def test_two_classes_are_measured_like_any_number_of_classes() -> None:
    numbers = metrics.classification(np.array([[2.0, 0], [0, 1], [3, 0]]), np.array([0, 1, 1]))
    assert numbers["accuracy"] == pytest.approx(2 / 3)
    assert numbers["roc_auc_macro"] == pytest.approx(0.5)
    assert not [name for name in numbers if name.startswith("accuracy@")]


def test_a_number_the_data_does_not_define_is_left_out_rather_than_zero() -> None:
    numbers = metrics.classification(np.eye(3), np.array([1, 1, 1]))
    assert "roc_auc_macro" not in numbers
    assert "log_loss" in numbers


def test_multi_label_numbers_count_the_labels_that_are_more_likely_than_not() -> None:
    probabilities_nc = np.array([[0.9, 0.4], [0.2, 0.35], [0.7, 0.1]])
    targets_nc = np.array([[1, 1], [0, 1], [1, 0]])
    numbers = metrics.multi_label(probabilities_nc, targets_nc)
    assert numbers["recall_micro"] == pytest.approx(0.5)
    assert numbers["precision_micro"] == numbers["map"] == 1.0
    assert numbers["exact_match"] == pytest.approx(1 / 3)


def test_calibration_error_is_the_weighted_gap_of_the_standard_curve(
    scored: tuple[np.ndarray, np.ndarray],
) -> None:
    logits_nc, targets = scored
    scores_nc = metrics.probabilities(logits_nc, temperature=0.3)
    bins = metrics.reliability(scores_nc, targets)
    right = scores_nc.argmax(axis=1) == targets
    frequency, confidence = calibration_curve(right, scores_nc.max(axis=1), n_bins=metrics.ECE_BINS)
    np.testing.assert_allclose(bins.frequency, frequency)
    np.testing.assert_allclose(bins.confidence, confidence, rtol=1e-6)
    assert bins.count.sum() == 400
    assert bins.error == pytest.approx(np.average(np.abs(frequency - confidence), weights=bins.count))


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (5, 5), (3, 8), (250, 300)])
def test_intervals_are_wilson_s(successes: int, trials: int) -> None:
    expected = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    np.testing.assert_allclose(
        metrics.wilson(np.array(successes), np.array(trials)), [expected.low, expected.high], atol=1e-12
    )


def test_every_interval_holds_its_number_and_is_unknown_where_nothing_was_counted(
    scored: tuple[np.ndarray, np.ndarray],
) -> None:
    logits_nc, targets = scored
    counted = metrics.per_class(logits_nc.argmax(axis=1), targets, 5)
    for name in ("precision", "recall", "f1"):
        value, interval = getattr(counted, name)[:4], getattr(counted, f"{name}_interval")
        assert (interval[:4, 0] < value).all()
        assert (value < interval[:4, 1]).all()
    assert np.isnan(counted.recall_interval[4]).all()


def test_coverage_falls_and_equal_scores_are_answered_together() -> None:
    curve = metrics.coverage_curve(
        np.array([0.9, 0.5, 0.5, 0.1]), np.array([True, True, False, False]), points=10
    )
    assert curve["coverage"] == [0.25, 0.75, 1.0]
    assert curve["precision"] == pytest.approx([1.0, 2 / 3, 0.5])
    assert curve["threshold"] == [0.9, 0.5, 0.1]


def test_targets_that_cannot_belong_to_the_scores_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        metrics.single_label(np.ones((3, 2)), np.array([0, 1]))
    with pytest.raises(ValueError, match="0 images"):
        metrics.single_label(np.ones((0, 2)), np.array([]))
