"""A second way from encoded bytes to pixels, written with Pillow's own functions alone.

Both sides of a certificate decode with `pipelines.images.prepare`, so a mistake there would be on both. Here
an image is decoded in full, turned upright and resized as the image spec says, in none of that code.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from pipelines.specs import ImageSpec

MAX_OF_OWN = 16.0
"""Largest mean |Δ| of an image's pixels, of 255. `prepare` decodes a large JPEG at a reduced scale, which
sharpens it: 8.4 at most is measured on 150 photographs at 64 pixels, 2.0 at 224, mostly 0."""
MAX_OF_EDGE_CASES = 1.0
"""The same of the edge cases, which are smooth or small: 0.3 is measured. Red for blue, a lost rotation or
another filter makes more than 10."""
IMAGES_OF_USER = 48
"""Images of the user that are decoded again; every edge case comes on top."""


def decode(payload: bytes, spec: ImageSpec) -> np.ndarray | None:
    """uint8 [height, width, 3]; None for values beyond 8 bits, whose white Pillow does not know."""
    with Image.open(io.BytesIO(payload)) as encoded:
        image = ImageOps.exif_transpose(encoded)
    if image.mode.startswith(("I", "F")):
        return None
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(_resize(image.convert("RGB"), spec))


def _resize(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """Resized as a whole, then its centre on a black ground: what is cut off is never computed."""
    sizes, shown = np.array(image.size), np.array([spec.width, spec.height])
    goals = np.rint(shown / spec.crop_fraction)
    if spec.fit != "stretch":
        scales = goals / sizes
        one = scales.argmax() if spec.fit == "crop" else scales.argmin()
        goals = np.where(np.arange(2) == one, goals, np.maximum(sizes * goals[one] // sizes[one], 1))
    canvas = Image.new("RGB", (spec.width, spec.height))
    shown = np.minimum(shown, goals).astype(int)
    first = (goals - shown) // 2
    box = np.concatenate([first, first + shown]) * np.tile(sizes / goals, 2)
    box = np.minimum(box, np.tile(sizes, 2)).tolist()
    resized = image.resize(tuple(shown.tolist()), Image.Resampling[spec.resample.upper()], box)
    canvas.paste(resized, ((spec.width - resized.width) // 2, (spec.height - resized.height) // 2))
    return canvas


def compare(payloads: Sequence[bytes], pixels_nhwc: np.ndarray, spec: ImageSpec) -> dict[str, Any]:
    """How far pixels are from those of the second way: the mean |Δ| of the worst image, and of all."""
    found = []
    for payload, pixels_hwc in zip(payloads, pixels_nhwc, strict=True):
        expected_hwc = decode(payload, spec)
        if expected_hwc is not None:
            found.append(float(np.abs(expected_hwc.astype(np.int16) - pixels_hwc).mean()))
    return {"images": len(found), "max": max(found, default=0.0), "mean": float(np.mean(found or [0.0]))}
