"""An image file -> the pixels that the model of this bundle takes, exactly as they were certified.

Needs Pillow 11 or later and NumPy (and pillow-heif for HEIF). `manifest.json` says size, fit and filter.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SPEC = json.loads(Path(__file__).with_name("manifest.json").read_text())["model"]["image_spec"]
FILTER = Image.Resampling[SPEC["resample"].upper()]
KEPT = SPEC.get("crop_fraction", 1.0)
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
    whole = whole_size(image, size)
    image.draft(None, whole)  # JPEG: decode at a reduced scale
    try:
        image.load()
    except OSError:
        image = Image.open(file)  # a lossless JPEG has no reduced scale
    image = fitted(in_rgb(image), whole, size, turn)
    return np.asarray(image.transpose(TURNS[turn]) if turn in TURNS else image)


def whole_size(image: Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of all of the image when it is resized, of which `size` is cut or filled."""
    width, height = round(size[0] / KEPT), round(size[1] / KEPT)
    if SPEC["fit"] == "stretch":
        return width, height
    if (width * image.height >= height * image.width) == (SPEC["fit"] == "crop"):
        return width, max(int(width * image.height / image.width), 1)
    return max(int(height * image.width / image.height), 1), height


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


def fitted(
    image: Image.Image, whole: tuple[int, int], size: tuple[int, int], turn: int | None
) -> Image.Image:
    """The centre of the image resized to `whole`, on black where that is smaller; fewest rows first."""
    shown = min(whole[0], size[0]), min(whole[1], size[1])
    x, y = turn in (2, 3, 7, 8), turn in (3, 4, 6, 7)  # the sides that are reversed as stored
    left, top = (whole[0] - shown[0] + x) // 2, (whole[1] - shown[1] + y) // 2
    across, down = image.width / whole[0], image.height / whole[1]
    right, bottom = min((left + shown[0]) * across, image.width), min((top + shown[1]) * down, image.height)
    box = left * across, top * down, right, bottom
    if shown[0] > box[2] - box[0] and shown[1] < box[3] - box[1]:
        image = image.resize((image.width, shown[1]), FILTER, box=(0, box[1], image.width, box[3]))
        box = box[0], 0, box[2], shown[1]
    black = Image.new("RGB", size)
    black.paste(
        image.resize(shown, FILTER, box), ((size[0] - shown[0] + x) // 2, (size[1] - shown[1] + y) // 2)
    )
    return black
