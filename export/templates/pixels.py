"""An image file -> the pixels that the model of this bundle takes, exactly as they were certified.

Needs Pillow 11 or later and NumPy (and pillow-heif for HEIF). `manifest.json` says size, fit and filter.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SPEC = json.loads(Path(__file__).with_name("manifest.json").read_text())["model"]["image_spec"]
FILTER = Image.Resampling[SPEC["resample"].upper()]
TURNS = {exif: Image.Transpose(turn) for exif, turn in {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.items()}


def pixels(file: str | Path) -> np.ndarray:
    """uint8 [height, width, 3]: upright RGB, transparency over white."""
    image: Image.Image = Image.open(file)
    if image.format not in ("JPEG", "MPO"):
        image.load()  # turns a TIFF upright
    try:
        turn = image.getexif().get(274)
    except Exception:
        turn = None  # damaged EXIF; the image is whole
    size = SPEC["width"], SPEC["height"]
    size = size[::-1] if turn in (5, 6, 7, 8) else size
    image.draft(None, cover(image, size))  # JPEG: decode at a reduced scale
    try:
        image.load()
    except OSError:
        image = Image.open(file)  # a lossless JPEG has no reduced scale
    image = resized(in_rgb(image), size)
    return np.asarray(image.transpose(TURNS[turn]) if turn in TURNS else image)


def cover(image: Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    """The smallest size from which the model's input can be made without enlarging."""
    if SPEC["fit"] == "stretch":
        return size
    scale = max(size[0] / image.width, size[1] / image.height)
    return max(size[0], round(image.width * scale)), max(size[1], round(image.height * scale))


def in_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB: 16 bits by their upper 8, 32 bits by their range, transparency over white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):  # white is the first of these values that is not exceeded
        white = {"I": (255, 32767, 65535), "F": (1, 255, 65535)}[image.mode][
            2 if image.format == "PPM" else 0 :
        ]
        grey = np.nan_to_num(np.asarray(image, np.float32), posinf=0, neginf=0)
        low, high = min(float(grey.min()), 0.0), float(grey.max())
        high = next((value for value in white if high <= value), high)
        image = Image.fromarray(((grey - low) * (255 / (high - low))).round().astype(np.uint8))
    elif image.has_transparency_data:
        over, image = image.convert("RGBA"), Image.new("RGB", image.size, "white")
        image.paste(over, mask=over)
    return image.convert("RGB")


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image at this size, stretched or cut from the centre; rows first where that is less work."""
    width, height = size
    left, top = 0.0, 0.0
    if SPEC["fit"] == "crop":
        scale = max(width / image.width, height / image.height)
        left, top = max((image.width - width / scale) / 2, 0), max((image.height - height / scale) / 2, 0)
    box = (left, top, image.width - left, image.height - top)
    if width > box[2] - box[0] and height < box[3] - box[1]:
        image = image.resize((image.width, height), FILTER, box=(0, box[1], image.width, box[3]))
        box = (box[0], 0, box[2], height)
    return image.resize(size, FILTER, box=box)
