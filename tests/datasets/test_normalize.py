"""The network's input is what a Hugging Face processor computes, and what the parity reference computes."""

import numpy as np
import torch

from export.reference import standardize
from pipelines.datasets.normalize import normalize
from pipelines.specs import ImageSpec

SPEC = ImageSpec(height=5, width=7, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))


def test_pixels_are_scaled_and_standardised_per_channel():
    pixels_nhwc = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), np.uint8)
    found = normalize(torch.from_numpy(pixels_nhwc), SPEC)
    assert (found.shape, found.dtype) == ((3, 3, 5, 7), torch.float32)
    np.testing.assert_allclose(found.numpy(), standardize(pixels_nhwc, SPEC), rtol=1e-6, atol=1e-6)
    blue = (pixels_nhwc[1, 2, 3, 2] / 255 - 0.3) / 0.3
    assert abs(float(found[1, 2, 2, 3]) - blue) < 1e-5
