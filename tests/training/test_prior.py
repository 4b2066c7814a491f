"""What sampling, class weights and logit adjustment did to class frequencies is put back into the logits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load

from pipelines.evaluation import calibration, metrics
from pipelines.training import evaluate, fit
from pipelines.training.losses import ClassCounts, class_weights, positive_weights, prior_shift
from pipelines.training.model import Classes
from pipelines.training.model_files import WEIGHTS
from pipelines.training.recipe import ClassBalance
from pipelines.training.validation import compute_logits
from tests.builders.training import ALONE, RECIPE, Blocks, decoded, picture, trained, trainer_over

RARE = 0.02


def images(n: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One feature and whether the image is of the rare class: log odds of the feature are 3x - 4.5."""
    rng = np.random.default_rng(seed)
    truth = rng.random(n) < share
    return rng.normal(3.0 * truth, 1.0), truth.astype(int)


def ideal_logits(x: np.ndarray, share: float, weights: np.ndarray | None = None) -> np.ndarray:
    """What a perfect model of images with this share of the rare class says."""
    log_odds = 3 * x - 4.5 + np.log(share / (1 - share))
    if weights is not None:
        log_odds += np.log(weights[1] / weights[0])
    return np.column_stack([np.zeros_like(x), log_odds])


def counts(n: int, share: float) -> ClassCounts:
    rare = round(n * share)
    return ClassCounts(np.array([n - rare, rare]), n)


BALANCES = {
    "oversampled": (ClassBalance(sampling="oversample"), 0.5),
    "weighted": (ClassBalance(class_weights="inverse"), RARE),
    "adjusted": (ClassBalance(logit_adjustment=1.0), RARE),
    "nothing": (ClassBalance(), RARE),
}


@pytest.mark.parametrize(("balance", "drawn_share"), BALANCES.values(), ids=BALANCES)
def test_probability_of_a_rare_class_is_its_share_again(balance, drawn_share):
    x, truth = images(50_000, RARE, seed=0)
    drawn = counts(20_000, drawn_share)
    logits_nc = ideal_logits(x, drawn_share, class_weights(balance, drawn.counts))
    # a model trained with the log prior added learns what is left of the logits
    logits_nc = logits_nc - balance.logit_adjustment * drawn.log_prior(multi_label=False)
    shift = prior_shift(balance, drawn=drawn, natural=counts(20_000, RARE), multi_label=False)

    def mean_rare(logits_nc: np.ndarray) -> tuple[float, float]:
        temperature = calibration.fit_temperature(logits_nc, truth)
        scores_nc = metrics.probabilities(logits_nc, temperature=temperature)
        return float(scores_nc[:, 1].mean()), metrics.classwise_error(scores_nc, truth)

    mean, error = mean_rare(logits_nc - shift)
    assert mean == pytest.approx(truth.mean(), rel=0.1)
    assert error < 0.005
    if shift.any():  # no temperature undoes it, and the class-wise error shows it
        mean, error = mean_rare(logits_nc)
        assert mean > 2 * truth.mean()
        assert error > 0.02


def looking_alike(n: int, rng: np.random.Generator) -> tuple[Blocks, np.ndarray]:
    """Images of which 2 % of each thousand are of the rare class: a fifth of the tenth that look like it."""
    kind = np.concatenate([rng.permutation(1000) for _ in range(n // 1000)])
    pixels_nhwc = np.stack([picture([int(one < 100)], rng) for one in kind])
    rare = (kind < 20).astype(int)
    return decoded(pixels_nhwc, rare[:, None].tolist()), rare


def test_a_model_trained_with_oversampling_gives_a_rare_class_its_own_frequency():
    """Learned by the training loop, calibrated on other images, measured on still others."""
    rng, balance = np.random.default_rng(0), ClassBalance(sampling="oversample")
    (training, rare), (held_out, truth) = looking_alike(1000, rng), looking_alike(2000, rng)
    recipe = replace(RECIPE, epochs=1, batch_size=32, class_balance=balance)
    made = trained(trainer_over(recipe, training, held_out, Classes(("a", "b"), False), ALONE), 1)
    batches = [made.batches.validation.take(np.arange(first, first + 250)) for first in range(0, 2000, 250)]
    logits_nc, _ = compute_logits(made.model, batches, made.task, precision="fp32")
    shift = prior_shift(
        balance,
        drawn=counts(2 * (1000 - rare.sum()), 0.5),
        natural=counts(1000, RARE),
        multi_label=False,
    )

    def mean_rare(logits_nc: np.ndarray) -> float:
        temperature = calibration.fit_temperature(logits_nc[:1000], truth[:1000])
        return float(metrics.probabilities(logits_nc[1000:], temperature=temperature)[:, 1].mean())

    assert mean_rare(logits_nc - shift) == pytest.approx(truth[1000:].mean(), rel=0.25)
    assert mean_rare(logits_nc) > 2 * truth[1000:].mean(), "what the test is about"


def test_positive_weights_of_a_multi_label_model_are_put_back():
    x, truth = images(50_000, RARE, seed=1)
    balance, seen = ClassBalance(class_weights="inverse"), ClassCounts(np.array([400]), 20_000)
    weights = positive_weights(balance, seen.counts, seen.images)
    logits_nc = (3 * x - 4.5 + np.log(RARE / (1 - RARE)) + np.log(weights[0]))[:, None]
    shift = prior_shift(balance, drawn=seen, natural=seen, multi_label=True)
    scores_nc = metrics.probabilities(logits_nc - shift, multi_label=True)
    assert scores_nc.mean() == pytest.approx(truth.mean(), rel=0.1)


def resnet() -> transformers.PreTrainedModel:
    """Its head ends in `classifier.1`."""
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=3, **sizes))


def distilled() -> transformers.PreTrainedModel:
    """Two heads, whose logits are averaged."""
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    config = transformers.DeiTConfig(num_labels=3, image_size=16, patch_size=8, **sizes)
    return transformers.DeiTForImageClassificationWithTeacher(config)


def files_of(model: transformers.PreTrainedModel, folder: Path) -> dict[str, bytes]:
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def logits_of(files: dict[str, bytes]) -> np.ndarray:
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return evaluate.load_network(files)(pixel_values=pixels).logits.double().numpy()


@pytest.mark.parametrize("model", [resnet, distilled])
def test_shift_is_taken_from_the_logits_whatever_the_head_is_called(model, tmp_path):
    files, shift = files_of(model(), tmp_path), np.array([0.5, -1.0, 0.25])
    found, taken = fit.put_back_prior(files, shift)
    assert np.array_equal(taken, shift)
    assert np.allclose(logits_of(files) - logits_of(found), shift, atol=1e-5)
    before, after = load(files[WEIGHTS]), load(found[WEIGHTS])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all("classifier" in name and name.endswith("bias") for name in changed)
    assert {name for name in files if files[name] != found[name]} == {WEIGHTS}


def test_nothing_is_stated_as_taken_from_a_head_without_bias(tmp_path, monkeypatch, caplog):
    files, shift = files_of(resnet(), tmp_path), np.array([0.5, -1.0, 0.25])
    network = evaluate.load_network(files)
    network.classifier[-1] = torch.nn.Linear(12, 3, bias=False)
    monkeypatch.setattr(evaluate, "load_network", lambda files: network)
    found, taken = fit.put_back_prior(files, shift)
    assert found == files and not taken.any()
    assert "has no bias" in caplog.text


def test_model_of_a_run_that_balanced_nothing_keeps_its_bytes():
    seen = counts(1000, 0.3)
    shift = prior_shift(ClassBalance(), drawn=seen, natural=seen, multi_label=False)
    found, taken = fit.put_back_prior({WEIGHTS: b"untouched"}, shift)
    assert found == {WEIGHTS: b"untouched"} and not taken.any()
