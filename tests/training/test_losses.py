"""Losses against closed forms and hand-computed numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from pipelines.datasets import dataset
from pipelines.datasets.settings import DataSettings, ImageCache, Splits
from pipelines.messages import InputError
from pipelines.training import decoded, fit
from pipelines.training.losses import build_criterion, class_weights, positive_weights
from pipelines.training.recipe import ClassBalance, Loss, Recipe
from pipelines.training.resources import Resources

COUNTS = np.array([90, 9, 1])
PLAIN, UNWEIGHTED = Loss(label_smoothing=0), ClassBalance()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(5, 3)
    return logits, functional.one_hot(torch.tensor([0, 1, 2, 0, 1]), 3).float()


def single(loss: Loss = PLAIN, balance: ClassBalance = UNWEIGHTED):
    return build_criterion(loss, balance, COUNTS, 100, multi_label=False)


def test_plain_loss_is_cross_entropy(batch):
    logits, targets = batch
    expected = functional.cross_entropy(logits, targets.argmax(1), reduction="none")
    torch.testing.assert_close(single()(logits, targets), expected)


def test_label_smoothing_is_that_of_torch(batch):
    logits, targets = batch
    expected = functional.cross_entropy(logits, targets.argmax(1), label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(single(Loss(label_smoothing=0.1))(logits, targets), expected)


def test_mixed_targets_cost_the_mixture_of_the_losses(batch):
    logits, targets = batch
    mixed = 0.3 * targets + 0.7 * targets.flip(0)
    expected = 0.3 * single()(logits, targets) + 0.7 * single()(logits, targets.flip(0))
    torch.testing.assert_close(single()(logits, mixed), expected)


def test_focal_loss_scales_cross_entropy_by_the_missing_confidence(batch):
    logits, targets = batch
    p = logits.softmax(1)[torch.arange(5), targets.argmax(1)]
    expected = -((1 - p) ** 2) * p.log()
    torch.testing.assert_close(single(Loss(label_smoothing=0, focal_gamma=2))(logits, targets), expected)


def test_class_weights_multiply_the_loss_of_their_class(batch):
    logits, targets = batch
    weighted = single(balance=ClassBalance(class_weights="inverse"))(logits, targets)
    # inverse weights, scaled to a mean of 1 over the images: 100 / (3 n_c)
    by_hand = torch.tensor([100 / 270, 100 / 27, 100 / 3])[targets.argmax(1)]
    torch.testing.assert_close(weighted, single()(logits, targets) * by_hand)


@pytest.mark.parametrize("name", ["none", "inverse", "sqrt", "effective"])
def test_class_weights_keep_the_size_of_the_average_loss(name):
    weights = class_weights(ClassBalance(class_weights=name), COUNTS)
    assert np.isclose((weights * COUNTS).sum() / COUNTS.sum(), 1)
    assert (np.diff(weights) >= 0).all()


def test_effective_number_weights_follow_the_paper():
    weights = class_weights(ClassBalance(class_weights="effective", effective_beta=0.9), COUNTS)
    raw = (1 - 0.9) / (1 - 0.9 ** COUNTS.astype(float))
    assert np.allclose(weights / weights[0], raw / raw[0])


def test_logit_adjustment_adds_the_log_prior_in_training(batch):
    logits, targets = batch
    prior = torch.tensor([0.9, 0.09, 0.01])
    expected = functional.cross_entropy(logits + prior.log(), targets.argmax(1), reduction="none")
    torch.testing.assert_close(single(balance=ClassBalance(logit_adjustment=1))(logits, targets), expected)


def test_multi_label_loss_is_binary_cross_entropy_with_positive_weights():
    torch.manual_seed(1)
    logits, targets = torch.randn(4, 3), (torch.rand(4, 3) > 0.5).float()
    balance = ClassBalance(class_weights="inverse")
    weights = positive_weights(balance, COUNTS, 100)
    assert np.allclose(weights, [10 / 90, 91 / 9, 99])
    expected = functional.binary_cross_entropy_with_logits(
        logits, targets, pos_weight=torch.tensor(weights, dtype=torch.float32), reduction="none"
    ).mean(1)
    found = build_criterion(PLAIN, balance, COUNTS, 100, multi_label=True)(logits, targets)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["bce", "asymmetric"])
def test_smoothing_moves_several_labels_towards_one_half(name):
    torch.manual_seed(2)
    logits, targets = torch.randn(4, 3), (torch.rand(4, 3) > 0.5).float()
    plain, smoothed = (
        build_criterion(
            Loss(label_smoothing=s, multi_label=name), ClassBalance(), COUNTS, 100, multi_label=True
        )
        for s in (0.0, 0.2)
    )
    torch.testing.assert_close(smoothed(logits, targets), plain(logits, 0.8 * targets + 0.1))


def test_smoothing_is_on_by_itself_for_one_label_only():
    unset = Recipe(model="scratch:tiny")
    assert unset.resolved(multi_label=False).loss.smoothing == 0.1
    assert unset.resolved(multi_label=True).loss.smoothing == 0
    asked = replace(unset, loss=Loss(label_smoothing=0.2))
    assert asked.resolved(multi_label=True).loss.smoothing == 0.2


def test_focal_loss_that_would_do_nothing_is_refused():
    with pytest.raises(ValueError, match="gamma_negative"):
        Loss(multi_label="asymmetric", focal_gamma=2)


def test_what_sampling_evened_out_is_not_corrected_again(tmp_path):
    """90 and 10 images: inverse weights of 0.56 and 5 without sampling, of 1 and 1 with it."""
    lines = [f"{i}.jpg,{'common' if i % 10 else 'rare'},{'train' if i < 100 else 'test'}" for i in range(110)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label,split", *lines]))
    settings = DataSettings(str(tmp_path / "labels.csv"), "labels", splits=Splits(validation_of_train=0.1))
    data = dataset.load(settings)

    def loss_of(balance: ClassBalance):
        recipe = Recipe(model="scratch:tiny", image_size=16, layers=1, loss=PLAIN, class_balance=balance)
        job = fit.plan_job(data, recipe, str(tmp_path / "run"), Resources())
        rows = {name: data.indices(name) for name in ("train", "validation", "test")}
        prepared = decoded.DecodedData(data, job.spec, job.spec, {}, rows, "memory", ImageCache(), [], {})
        task = fit.task_of(job, prepared, None)
        return build_criterion(PLAIN, balance, task.class_counts, task.epoch_images, multi_label=False)

    weighted = ClassBalance(class_weights="inverse", logit_adjustment=1)
    assert loss_of(weighted).class_weights.tolist() == pytest.approx([5 / 9, 5])
    even = loss_of(replace(weighted, sampling="oversample"))
    assert even.class_weights.tolist() == [1, 1]
    assert even.log_prior.tolist() == pytest.approx([np.log(0.5)] * 2)


def test_asymmetric_loss_of_one_label_for_each_image_is_refused():
    with pytest.raises(InputError, match="one label for each image"):
        Recipe(loss=Loss(multi_label="asymmetric")).resolved(multi_label=False)


def test_asymmetric_loss_forgives_absent_labels_below_the_margin():
    settings = Loss(label_smoothing=0, multi_label="asymmetric")
    loss = build_criterion(settings, ClassBalance(), COUNTS, 100, multi_label=True)
    unlikely = torch.full((1, 3), -4.0)  # a probability of 0.018, below the margin of 0.05
    assert loss(unlikely, torch.zeros(1, 3)).item() == pytest.approx(0)
    p = torch.tensor(0.7)
    logit = torch.logit(p).repeat(1, 3)
    absent = -((p - 0.05) ** 4) * torch.log(1 - (p - 0.05))
    torch.testing.assert_close(loss(logit, torch.zeros(1, 3))[0], absent)
    torch.testing.assert_close(loss(logit, torch.ones(1, 3))[0], -(1 - p) * p.log())


@pytest.mark.parametrize(
    ("loss", "multi_label"),
    [
        (Loss(label_smoothing=0, focal_gamma=0.5), False),
        (Loss(label_smoothing=0, focal_gamma=0.5), True),
        (Loss(label_smoothing=0, multi_label="asymmetric", gamma_positive=0.5, gamma_negative=0.5), True),
    ],
)
def test_exponents_below_one_have_finite_gradients_where_the_model_is_certain(loss, multi_label):
    logits = torch.tensor([[200.0, -200.0, -200.0]], requires_grad=True)
    targets = torch.tensor([[1.0, 0.0, 0.0]])
    build_criterion(loss, ClassBalance(), COUNTS, 100, multi_label=multi_label)(
        logits, targets
    ).sum().backward()
    assert logits.grad.isfinite().all()
