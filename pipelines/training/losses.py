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

from pipelines.training.recipe import Balance, Loss


@dataclass(frozen=True)
class Criterion:
    """The loss of a run: its settings, and what the class counts made of them."""

    loss: Loss
    multi_label: bool
    class_weights: Tensor
    """[classes]; multi-label: the weight of a class's positives."""
    log_prior: Tensor
    """[classes], already times tau: added to the logits while training."""

    def __call__(self, logits_nc: Tensor, targets_nc: Tensor) -> Tensor:
        """Loss of each image, float32 [n]."""
        logits_nc = logits_nc.float() + self.log_prior.to(logits_nc.device)
        if self.multi_label:
            targets_nc = smoothed(targets_nc, self.loss.smoothing, choices=2)
        weights = self.class_weights.to(logits_nc.device)
        if not self.multi_label:
            return cross_entropy(
                logits_nc,
                targets_nc,
                weights,
                smoothing=self.loss.smoothing,
                focal_gamma=self.loss.focal_gamma,
            )
        if self.loss.multi_label == "asymmetric":
            return asymmetric(logits_nc, targets_nc, weights, self.loss)
        return binary_cross_entropy(logits_nc, targets_nc, weights, focal_gamma=self.loss.focal_gamma)


def criterion(
    loss: Loss, balance: Balance, class_counts: npt.NDArray[np.int64], n_images: int, *, multi_label: bool
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


def class_weights(balance: Balance, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
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
    balance: Balance, counts: npt.NDArray[np.int64], n_images: int
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


def cross_entropy(
    logits_nc: Tensor, targets_nc: Tensor, weights: Tensor, *, smoothing: float, focal_gamma: float
) -> Tensor:
    """-sum_c w_c t_c (1 - p_c)^gamma log p_c, with t smoothed towards uniform; [n]."""
    targets_nc = smoothed(targets_nc, smoothing, choices=logits_nc.shape[1])
    log_p = functional.log_softmax(logits_nc, 1)
    focus = (1 - log_p.exp()) ** focal_gamma if focal_gamma else 1.0
    return -(weights * targets_nc * focus * log_p).sum(1)


def smoothed(targets_nc: Tensor, smoothing: float, *, choices: int) -> Tensor:
    """Targets with this share of them spread evenly over all choices: the classes, or yes and no."""
    return targets_nc * (1 - smoothing) + smoothing / choices


def binary_cross_entropy(
    logits_nc: Tensor, targets_nc: Tensor, weights: Tensor, *, focal_gamma: float
) -> Tensor:
    """Sigmoid cross entropy, the mean over classes; [n]."""
    present = functional.logsigmoid(logits_nc) * targets_nc * weights
    absent = functional.logsigmoid(-logits_nc) * (1 - targets_nc)
    if focal_gamma:
        p = logits_nc.sigmoid()
        present, absent = present * (1 - p) ** focal_gamma, absent * p**focal_gamma
    return -(present + absent).mean(1)


def asymmetric(logits_nc: Tensor, targets_nc: Tensor, weights: Tensor, loss: Loss) -> Tensor:
    """Ridnik et al. 2021, equations 4 to 6: absent labels are focused harder and shifted.

    The mean over classes; [n].
    """
    p = logits_nc.sigmoid()
    shifted = (p - loss.probability_margin).clamp(min=0)
    present = (1 - p) ** loss.gamma_positive * functional.logsigmoid(logits_nc) * targets_nc * weights
    absent = shifted**loss.gamma_negative * torch.log((1 - shifted).clamp(min=1e-8)) * (1 - targets_nc)
    return -(present + absent).mean(1)
