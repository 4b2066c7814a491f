"""Logits and targets to one number per image, ready to be averaged over the global batch.

Every loss returns float32 [n]: the mean over images, micro-batches and workers is then the same number
however the batch was cut. Targets are rows of shares [n, classes] (mixed or not), or 0/1 when multi-label.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from pipelines.training.recipe import ClassBalance, Loss


@dataclass(frozen=True)
class Criterion:
    """The loss of a run: its settings, and what the class counts made of them."""

    loss: Loss
    multi_label: bool
    class_weights: Tensor
    """[classes]; multi-label: the weight of a class's positives."""
    log_prior: Tensor
    """[classes], already times tau: added to the logits during training."""

    def __call__(self, logits_nc: Tensor, targets_nc: Tensor) -> Tensor:
        """Loss of each image, float32 [n]."""
        logits_nc = logits_nc.float() + self.log_prior.to(logits_nc.device)
        weights, smoothing = self.class_weights.to(logits_nc.device), self.loss.smoothing
        if self.multi_label:
            targets_nc = _smooth(targets_nc, smoothing, choices=2)
            if self.loss.multi_label == "asymmetric":
                return _asymmetric(logits_nc, targets_nc, weights, self.loss)
            return _binary_cross_entropy(logits_nc, targets_nc, weights, focal_gamma=self.loss.focal_gamma)
        if self.loss.focal_gamma:
            targets_nc = _smooth(targets_nc, smoothing, choices=logits_nc.shape[1])
            return _focal_cross_entropy(logits_nc, targets_nc, weights, gamma=self.loss.focal_gamma)
        return functional.cross_entropy(
            logits_nc, targets_nc, weights, label_smoothing=smoothing, reduction="none"
        )


def build_criterion(
    loss: Loss,
    balance: ClassBalance,
    class_counts: npt.NDArray[np.int64],
    n_images: int,
    *,
    multi_label: bool,
) -> Criterion:
    """The loss for training passes that draw `n_images` with these counts of each class.

    They are counts as sampled: what sampling has evened out is not to be corrected again.
    """
    if multi_label:
        weights = positive_weights(balance, class_counts, n_images)
        share = np.clip(class_counts / max(n_images, 1), 1e-6, 1 - 1e-6)
        log_prior = np.log(share / (1 - share))
    else:
        weights = class_weights(balance, class_counts)
        log_prior = np.log(np.maximum(class_counts, 1) / max(class_counts.sum(), 1))
    return Criterion(
        loss,
        multi_label,
        torch.from_numpy(weights.astype(np.float32)),
        torch.from_numpy((balance.logit_adjustment * log_prior).astype(np.float32)),
    )


@dataclass(frozen=True)
class ClassCounts:
    """How often each class occurs among so many images."""

    counts: npt.NDArray[np.int64]
    images: int

    def log_prior(self, *, multi_label: bool) -> npt.NDArray[np.float64]:
        """Log share of each class; multi-label: its log odds."""
        if multi_label:
            share = np.clip(self.counts / max(self.images, 1), 1e-6, 1 - 1e-6)
            return np.asarray(np.log(share / (1 - share)))
        return np.asarray(np.log(np.maximum(self.counts, 1) / max(self.counts.sum(), 1)))


def prior_shift(
    balance: ClassBalance, *, drawn: ClassCounts, natural: ClassCounts, multi_label: bool
) -> npt.NDArray[np.float64]:
    """What sampling, class weights and logit adjustment added to each class's logit, float64 [classes].

    A class drawn or weighed k times as much comes out log k higher (Saerens et al. 2002, equation 4), and
    `logit_adjustment` takes tau log-priors away (Menon et al. 2021). Zeros where nothing was done.
    """
    prior = drawn.log_prior(multi_label=multi_label)
    if multi_label:
        weights = positive_weights(balance, drawn.counts, drawn.images)
    else:
        weights = class_weights(balance, drawn.counts)
    sampled = prior - natural.log_prior(multi_label=multi_label)
    return np.asarray(np.log(weights) + sampled - balance.logit_adjustment * prior)


def class_weights(balance: ClassBalance, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """One weight per class, scaled so that the average over the training images is 1.

    `effective` is (1 - beta) / (1 - beta^n), equation 5 of Cui et al. 2019. A class without
    images counts as one.
    """
    n = np.maximum(counts, 1).astype(np.float64)
    raw = {
        "none": np.ones_like(n),
        "inverse": 1 / n,
        "sqrt": 1 / np.sqrt(n),
        "effective": (1 - balance.effective_beta) / (1 - balance.effective_beta**n),
    }[balance.class_weights]
    return np.asarray(raw * (n.sum() / (raw * n).sum()))


def positive_weights(
    balance: ClassBalance, counts: npt.NDArray[np.int64], n_images: int
) -> npt.NDArray[np.float64]:
    """Weight of a class's positives against its negatives; `inverse` makes both sides equally heavy."""
    positives = np.maximum(counts, 1).astype(np.float64)
    negatives = np.maximum(n_images - counts, 1).astype(np.float64)
    beta = balance.effective_beta
    return {
        "none": np.ones_like(positives),
        "inverse": negatives / positives,
        "sqrt": np.sqrt(negatives / positives),
        "effective": (1 - beta**negatives) / (1 - beta**positives),
    }[balance.class_weights]


def _focal_cross_entropy(logits_nc: Tensor, targets_nc: Tensor, weights: Tensor, *, gamma: float) -> Tensor:
    """-sum_c w_c t_c (1 - p_c)^gamma log p_c; [n]."""
    log_p = functional.log_softmax(logits_nc, 1)
    return -(weights * targets_nc * _power(1 - log_p.exp(), gamma) * log_p).sum(1)


def _smooth(targets_nc: Tensor, smoothing: float, *, choices: int) -> Tensor:
    """Targets with this fraction of them spread evenly over all choices: the classes, or yes and no."""
    return targets_nc * (1 - smoothing) + smoothing / choices


def _binary_cross_entropy(
    logits_nc: Tensor, targets_nc: Tensor, weights: Tensor, *, focal_gamma: float
) -> Tensor:
    """Sigmoid cross entropy, the mean over classes; [n]."""
    if not focal_gamma:
        return functional.binary_cross_entropy_with_logits(
            logits_nc, targets_nc, pos_weight=weights, reduction="none"
        ).mean(1)
    p = logits_nc.sigmoid()
    present = _power(1 - p, focal_gamma) * functional.logsigmoid(logits_nc) * targets_nc * weights
    absent = _power(p, focal_gamma) * functional.logsigmoid(-logits_nc) * (1 - targets_nc)
    return -(present + absent).mean(1)


def _asymmetric(logits_nc: Tensor, targets_nc: Tensor, weights: Tensor, loss: Loss) -> Tensor:
    """Ridnik et al. 2021, equations 4 to 6: absent labels are focused harder and shifted.

    The mean over classes; [n].
    """
    p = logits_nc.sigmoid()
    shifted = (p - loss.probability_margin).clamp(min=0)
    present = _power(1 - p, loss.gamma_positive) * functional.logsigmoid(logits_nc) * targets_nc * weights
    margin = torch.log((1 - shifted).clamp(min=1e-8))
    absent = _power(shifted, loss.gamma_negative) * margin * (1 - targets_nc)
    return -(present + absent).mean(1)


def _power(base: Tensor, exponent: float) -> Tensor:
    """base^exponent of probabilities; below an exponent of 1 the gradient at 0 would be infinite."""
    return (base.clamp(min=1e-6) if 0 < exponent < 1 else base) ** exponent
