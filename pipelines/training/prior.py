"""The class frequencies that training was shown, taken out of a model again.

Sampling, class weights and logit adjustment change how often a class seems to occur. No temperature can undo
that, so the last layer's biases are moved back before one is fitted: the probabilities then hold for images
as they come. What the network has learned to tell apart is untouched.
"""

import logging
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load, save

WEIGHTS = "model.safetensors"
NEGLIGIBLE = 1e-9

logger = logging.getLogger(__name__)


def put_back(files: Mapping[str, bytes], shift: npt.NDArray[np.float64]) -> dict[str, bytes]:
    """The model's files with `shift` subtracted from its logits; the same files where it is zero."""
    if np.abs(shift).max() < NEGLIGIBLE:
        return dict(files)
    tensors = load(files[WEIGHTS])
    biases = [
        name for name in tensors if name.endswith("classifier.bias") and len(tensors[name]) == len(shift)
    ]
    if not biases:
        logger.warning(
            "the model has no classifier.bias: its probabilities keep the balanced class frequencies"
        )
        return dict(files)
    for name in biases:  # distilled DeiT has two heads, whose logits are averaged
        tensors[name] = (tensors[name].double() - torch.from_numpy(shift)).to(tensors[name].dtype)
    return {**files, WEIGHTS: save(tensors, metadata={"format": "pt"})}
