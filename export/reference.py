"""What a released model is compared with: the checkpoint in PyTorch float32, written as plainly as possible.

It shares no code with the graph (`convert.py`): normalisation and activation are repeated here in numpy,
so that a mistake there is a difference here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipelines.specs import ImageSpec

Network = Callable[[np.ndarray, ImageSpec], np.ndarray]
"""uint8 pixels [n, height, width, 3] and their normalisation -> logits [n, classes]."""

_BATCH = 8
"""Images per forward pass: what a laptop's memory holds of a ViT-L with eager attention."""


def torch_reference(network: Any) -> Network:
    """The checkpoint's own forward pass on CPU, in float32, in eager mode."""
    import torch

    def logits(pixels_nhwc: np.ndarray, spec: ImageSpec) -> np.ndarray:
        found = []
        with torch.no_grad():
            for start in range(0, len(pixels_nhwc), _BATCH):
                batch = torch.from_numpy(standardize(pixels_nhwc[start : start + _BATCH], spec))
                found.append(network(pixel_values=batch).logits.numpy())
        return np.concatenate(found)

    return logits


def standardize(pixels_nhwc: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """float32 [n, 3, height, width], as a Hugging Face processor computes it: rescale, then standardise."""
    unit = pixels_nhwc.astype(np.float32) / np.float32(255)
    standard = (unit - np.asarray(spec.mean, np.float32)) / np.asarray(spec.std, np.float32)
    return np.ascontiguousarray(standard.transpose(0, 3, 1, 2))


def activation(logits_nc: np.ndarray, *, temperature: float, multi_label: bool) -> np.ndarray:
    """Probabilities in float64: softmax, or sigmoid where labels are independent."""
    scaled = logits_nc.astype(np.float64) / temperature
    if multi_label:
        return np.asarray(1 / (1 + np.exp(-scaled)))
    exponent = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.asarray(exponent / exponent.sum(axis=1, keepdims=True))


def top(probabilities_nc: np.ndarray, k: int) -> np.ndarray:
    """Class indices [n, k], best first; equal scores in class order."""
    return np.argsort(-probabilities_nc, axis=1, kind="stable")[:, :k]


def list_top(class_ids: Sequence[str], probabilities: np.ndarray, k: int) -> list[list[str | float]]:
    """The top k of one image as [id, probability] pairs."""
    order = top(probabilities[None], k)[0]
    return [[class_ids[index], round(float(probabilities[index]), 6)] for index in order]
