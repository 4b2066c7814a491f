"""Stochastic depth (Huang et al. 2016): residual branches are dropped per image, more often higher up.

Architectures that have it of their own (BEiT, Swin, DINOv2, ConvNeXt …) use that; plain blocks get it by
hooks, because they are Hugging Face's, and a saved model knows nothing of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pipelines.training.layers import ModelError, blocks

OWN_SETTING = "drop_path_rate"
"""Name in the config of an architecture that has stochastic depth of its own."""


def own_setting(config: Any, rate: float) -> dict[str, float]:
    """What to set in a model's config so that its own stochastic depth, if any, has this rate."""
    return {OWN_SETTING: rate} if hasattr(config, OWN_SETTING) else {}


def add(model: Any, rate: float) -> None:
    """Drop the branches of every block of a model that does not do so itself.

    Raises:
        ModelError: the blocks do not show their two branches.
    """
    if not rate or hasattr(model.config, OWN_SETTING):
        return
    found = blocks(model)
    for i, block in enumerate(found):
        for branch in residual_branches(block):
            branch.register_forward_hook(dropper(rate * (i + 1) / len(found)))


def residual_branches(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """What a Transformer block adds to its input: attention, then the feed-forward network."""
    attention = getattr(block, "attention", None) or getattr(block, "self_attn", None)
    mlp = getattr(block, "mlp", None)
    if not isinstance(attention, nn.Module) or not isinstance(mlp, nn.Module):
        raise ModelError(
            f"drop_path needs blocks of `attention` and `mlp`, not {type(block).__name__}; set it to 0"
        )
    return attention, mlp


def dropper(rate: float) -> Any:
    """A forward hook that zeroes a branch's output for a random share of the images and scales the others."""

    def drop(module: nn.Module, _inputs: Sequence[Any], output: Any) -> Any:
        if not module.training:
            return output
        branch = output[0] if isinstance(output, tuple) else output
        kept = torch.rand(len(branch), *[1] * (branch.ndim - 1), device=branch.device) >= rate
        branch = branch * (kept / max(1 - rate, 1e-6)).to(branch.dtype)
        return (branch, *output[1:]) if isinstance(output, tuple) else branch

    return drop
