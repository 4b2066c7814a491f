"""Decoded pixels -> what a network takes, in torch: scaled to [0, 1], then standardised per channel."""

from typing import TYPE_CHECKING

from pipelines.specs import ImageSpec

if TYPE_CHECKING:
    import torch


def normalize(pixels_nhwc: "torch.Tensor", spec: ImageSpec) -> "torch.Tensor":
    """float32 [n, 3, height, width] of uint8 [n, height, width, 3], on the same device."""
    return standardize(scale_to_unit(pixels_nhwc), spec)


def scale_to_unit(pixels_nhwc: "torch.Tensor") -> "torch.Tensor":
    """float32 [n, 3, height, width] in [0, 1]."""
    return pixels_nhwc.float().permute(0, 3, 1, 2) / 255


def standardize(images_nchw: "torch.Tensor", spec: ImageSpec) -> "torch.Tensor":
    """Images in [0, 1] with the spec's mean subtracted and divided by its standard deviation."""
    import torch

    mean, std = (torch.tensor(v, device=images_nchw.device)[:, None, None] for v in (spec.mean, spec.std))
    return (images_nchw - mean) / std
