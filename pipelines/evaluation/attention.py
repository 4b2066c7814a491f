"""Turn a Vision Transformer and pixels into maps of where it looked: attention roll-out.

Abnar and Zuidema 2020, section 3: the attention of all blocks, averaged over heads, half of it replaced by
the residual connection, multiplied through. A map shows what reached the class token, not why the label
was given. No files, no plotting.
"""

from typing import Any

import numpy as np
import torch

from pipelines.datasets.normalize import normalize
from pipelines.evaluation.metrics import Array
from pipelines.specs import ImageSpec


class NoAttention(Exception):
    """The model returns no attention over a grid of patches (it is no plain Vision Transformer)."""


def roll_out(model: Any, pixels_nhwc: Array, spec: ImageSpec) -> Array:
    """`float32[N, rows, columns]` in [0, 1] per patch, 1 where the model looked most.

    Args:
        model: a Hugging Face image classifier; its attention implementation is switched for the call,
            since the fused ones do not return what they attended to.
        pixels_nhwc: uint8 RGB of the size that `spec` says.

    Raises:
        NoAttention: the model has no attention over patches.
    """
    rows, columns = patch_grid(model.config)
    implementation, training = model.config._attn_implementation, model.training
    model.set_attn_implementation("eager")
    model.eval()
    try:
        with torch.no_grad():
            pixels = torch.from_numpy(np.ascontiguousarray(pixels_nhwc)).to(model.device)
            found = model(pixel_values=normalize(pixels, spec), output_attentions=True)
    finally:
        model.set_attn_implementation(implementation)
        model.train(training)
    attentions = getattr(found, "attentions", None) or ()
    # One shape for all blocks: window attention (Swin) and pyramids have several, and no common tokens.
    if len({attention.shape for attention in attentions}) != 1:
        raise NoAttention(f"{type(model).__name__} returns no attention of all its patches to each other")
    return _scale(_multiply(attentions), rows, columns)


def patch_grid(config: Any) -> tuple[int, int]:
    """Rows and columns of patches."""
    try:
        (height, width), (patch_height, patch_width) = _pair(config.image_size), _pair(config.patch_size)
    except AttributeError as error:
        raise NoAttention(f"{config.model_type} has no grid of patches: {error}") from error
    return height // patch_height, width // patch_width


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _multiply(attentions: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """[N, tokens, tokens]: how much of each input token is in each output token."""
    tokens = attentions[0].shape[-1]
    flow = torch.eye(tokens, device=attentions[0].device).expand(len(attentions[0]), -1, -1)
    for attention in attentions:
        # Rows of attention sum to 1, so half of it and half of the identity do too.
        flow = (attention.float().mean(dim=1) + torch.eye(tokens, device=flow.device)) / 2 @ flow
    return flow


def _scale(flow: torch.Tensor, rows: int, columns: int) -> Array:
    """What reached the class token (without one, the mean token) from each patch, stretched to [0, 1]."""
    extra = flow.shape[-1] - rows * columns
    if extra < 0:
        raise NoAttention(f"{flow.shape[-1]} tokens are fewer than {rows} x {columns} patches")
    reached = flow[:, 0] if extra else flow.mean(dim=1)
    maps: Array = reached[:, extra:].reshape(-1, rows, columns).cpu().numpy().astype(np.float32)
    low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
    return np.asarray((maps - low) / np.maximum(high - low, 1e-12))
