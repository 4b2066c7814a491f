"""Encoded bytes -> the uint8 RGB pixels that a model sees, or a status that says why there are none.

The only code that turns bytes into pixels: training, evaluation, parity and classification all call
`prepare`. It is pure (no I/O, no clock, no logging) and never raises for an image. It does not apply
colour profiles: every image is treated as sRGB. A decoder that crashes or hangs takes the process along;
`DecoderProcess` runs it in another one.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from PIL.Image import Resampling, Transpose

from pipelines.images.formats import sniff
from pipelines.status import Status

if TYPE_CHECKING:  # the decoder's child starts without pydantic
    from pipelines.specs import DecodeLimits, ImageSpec

Pixels = npt.NDArray[np.uint8]

REFUSED_PLUGINS = frozenset({"EPS", "WMF", "MPEG", "HDF5", "BUFR", "GRIB"})
"""EPS would run Ghostscript on untrusted files; for the others Pillow has no decoder of its own."""

COMMON_PLUGINS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF")
"""Tried first: what publishers serve."""

TRANSPOSES = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""EXIF orientation -> the transposition that turns the image upright (EXIF 2.32, tag 0x0112)."""

MIRRORED_X, MIRRORED_Y = frozenset({2, 3, 7, 8}), frozenset({3, 4, 6, 7})
"""Orientations that reverse the columns or the rows as stored: an odd pixel is cut off at their other end."""

ORIENTATION_TAG = 0x0112

HEADER_IN_ICON = re.compile(rb"(?:IHDR|ihdr|\xff\x4f\xff\x51.{4})(.{4})(.{4})", re.DOTALL)
"""The two sides of a PNG or JPEG 2000 file, in either order."""

WIDE_RANGES = {"I;16": (65535.0,), "I": (255.0, 32767.0, 65535.0), "F": (1.0, 255.0, 65535.0)}
"""Candidate values of white in a grey image of more than 8 bits, by Pillow's mode."""


@dataclass(frozen=True)
class Prepared:
    """The result of `prepare` for one image; `pixels_hwc` is set exactly when the status is `ok`."""

    status: Status
    error: str | None = None
    pixels_hwc: Pixels | None = None
    width_px: int | None = None
    height_px: int | None = None
    format: str | None = None


class _Undecodable(Exception):
    """An image that yields no pixels, with the status that its row gets."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message


def prepare(payload: bytes, spec: ImageSpec, limits: DecodeLimits | None = None) -> Prepared:
    """Turn encoded bytes into uint8 [spec.height, spec.width, 3] RGB, C-contiguous.

    First frame, upright, transparency over white. Width and height are those of the file, before any
    rotation. Bad bytes get a status and a one-line `error`, never an exception.
    """
    if limits is None:
        from pipelines.specs import DecodeLimits

        limits = DecodeLimits()
    width_px = height_px = None
    name = None
    try:
        _check_icon(payload, limits)
        with _open(payload) as image:
            width_px, height_px = _read_encoded_size(image)
            name = _name_format(image)
            _check_size(width_px, height_px, limits)
            return Prepared(Status.OK, None, _make_pixels(image, payload, spec), width_px, height_px, name)
    except _Undecodable as error:
        status, message = error.status, error.message
    except Image.DecompressionBombError as error:
        status, message = Status.TOO_MANY_PIXELS, _one_line(error)
    # Pillow's plugins raise TypeError, ValueError, RuntimeError, SyntaxError, KeyError, struct.error,
    # zlib.error, MemoryError and OSError on broken files: whatever it is, the image caused it.
    except Exception as error:
        status, message = _find_status(error, payload), _one_line(error)
    return Prepared(status, message, None, width_px, height_px, name or sniff(payload))


@cache
def register_plugins() -> tuple[str, ...]:
    """Pillow's decoders that may see a payload, common ones first; HEIF among them when it is installed."""
    Image.init()
    try:
        import pillow_heif
    except ImportError:
        pass
    else:
        pillow_heif.register_heif_opener(thumbnails=False)
    rare = [name for name in Image.ID if name not in COMMON_PLUGINS and name not in REFUSED_PLUGINS]
    return (*COMMON_PLUGINS, *rare)


@contextmanager
def _open(payload: bytes) -> Iterator[Image.Image]:
    """Open the image without decoding it, and release its buffers afterwards."""
    if not payload:
        raise _Undecodable(Status.EMPTY, "zero bytes")
    try:
        image = Image.open(io.BytesIO(payload), formats=register_plugins())
    except UnidentifiedImageError:
        raise _explain_unidentified(payload) from None
    try:
        yield image
    finally:
        image.close()


def _explain_unidentified(payload: bytes) -> _Undecodable:
    """Describe a payload that no plugin opens."""
    name = sniff(payload)
    if name is None:
        return _Undecodable(Status.NOT_AN_IMAGE, f"no image format starts with {bytes(payload[:16])!r}")
    if name.upper() in register_plugins():
        return _Undecodable(Status.DECODE_FAILED, f"the header of this {name} file cannot be read")
    remedy = "; pip install 'iab-vision[heif]' adds it" if name == "heif" else ""
    return _Undecodable(Status.UNSUPPORTED_FORMAT, f"{name} files are not decoded here{remedy}")


def _name_format(image: Image.Image) -> str | None:
    """The format, lower-case; MPO is a JPEG followed by further images."""
    name = (image.format or "").lower()
    return "jpeg" if name == "mpo" else name or None


def _read_encoded_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as encoded; for TIFF Pillow reports them after rotation, the tags before."""
    tags = getattr(image, "tag_v2", None)
    width, height = image.size
    if tags is not None and tags.get(ORIENTATION_TAG, 1) in (5, 6, 7, 8):
        return height, width
    return width, height


def _check_size(width: int, height: int, limits: DecodeLimits) -> None:
    """Refuse by the header, before any pixel is decoded."""
    if width < 1 or height < 1:
        raise _Undecodable(Status.DECODE_FAILED, f"the header says {width} x {height} pixels")
    if max(width, height) > limits.max_side:
        message = f"{width} x {height} pixels; the longest side allowed is {limits.max_side} (max_side)"
        raise _Undecodable(Status.TOO_MANY_PIXELS, message)
    if width * height > limits.max_pixels:
        raise _Undecodable(
            Status.TOO_MANY_PIXELS,
            f"{width} x {height} pixels; the limit is {limits.max_pixels} (max_pixels)",
        )


def _check_icon(payload: bytes, limits: DecodeLimits) -> None:
    """Refuse an icon by the files in it, which Pillow decodes before it tells their size."""
    if payload[:4] in (b"\0\0\1\0", b"icns"):
        for one, other in HEADER_IN_ICON.findall(payload):
            _check_size(int.from_bytes(one, "big"), int.from_bytes(other, "big"), limits)


def _find_status(error: Exception, payload: bytes) -> Status:
    """Tell a file that ends too early from one that is broken otherwise."""
    text = str(error).lower()
    if isinstance(error, EOFError) or any(
        word in text for word in ("truncated", "end of file", "not enough")
    ):
        return Status.TRUNCATED
    # libwebp reports no reason; the length in the container does
    riff = payload[:4] == b"RIFF" and payload[8:12] == b"WEBP"
    if riff and int.from_bytes(payload[4:8], "little") + 8 > len(payload):
        return Status.TRUNCATED
    return Status.DECODE_FAILED


def _one_line(error: Exception) -> str:
    """An exception as one line for a person."""
    text = " ".join(str(error).split()).encode(errors="replace").decode()
    return f"{type(error).__name__}: {text}"[:300].removesuffix(": ")


def _make_pixels(image: Image.Image, payload: bytes, spec: ImageSpec) -> Pixels:
    """Decode, turn upright, resize: uint8 [height, width, 3]."""
    if image.format in ("JPEG", "MPO"):
        orientation = _read_orientation(image)
        resized = _find_resized_size(image.size, spec, orientation)
        image = _decode_jpeg(image, payload, smallest=resized)
    else:  # Pillow rotates TIFF as it loads, and PNG may hold EXIF after the pixels: read it afterwards
        image.load()
        orientation = _read_orientation(image)
        resized = _find_resized_size(image.size, spec, orientation)
    fitted = _fit(_convert_to_8_bit(image), resized, spec, orientation)
    if orientation in TRANSPOSES:
        fitted = fitted.transpose(TRANSPOSES[orientation])
    return np.array(fitted if fitted.mode == "RGB" else fitted.convert("RGB"), dtype=np.uint8)


def _decode_jpeg(image: Image.Image, payload: bytes, smallest: tuple[int, int]) -> Image.Image:
    """Decode at the least of 1/1, 1/2, 1/4, 1/8 of its size not below `smallest`, in the DCT domain."""
    full = image.size
    image.draft(None, smallest)
    try:
        image.load()
    except OSError as error:
        # libjpeg-turbo decodes lossless JPEG but cannot scale it, and reports only this
        if image.size == full or "broken data stream" not in str(error):
            raise
        image = Image.open(io.BytesIO(payload), formats=["JPEG"])
        image.load()
    return image


def _read_orientation(image: Image.Image) -> int:
    """EXIF (or XMP) orientation, 1 to 8; 1 when there is none or it is damaged."""
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    # Damaged EXIF raises whatever its parser met (struct.error, ValueError, SyntaxError, TypeError …);
    # the image itself is whole.
    except Exception:
        return 1
    return int(value) if value in TRANSPOSES else 1


def _find_target_size(spec: ImageSpec, orientation: int) -> tuple[int, int]:
    """(width, height) of the result before the image is turned upright."""
    return (spec.height, spec.width) if orientation >= 5 else (spec.width, spec.height)


def _find_resized_size(size: tuple[int, int], spec: ImageSpec, orientation: int) -> tuple[int, int]:
    """(width, height) of all of the image when it is resized, as transformers and torchvision round them."""
    width, height = size
    to_width, to_height = (round(side / spec.crop_fraction) for side in _find_target_size(spec, orientation))
    if spec.fit == "stretch":
        return to_width, to_height
    covers_by_width = to_width * height >= to_height * width
    if covers_by_width == (spec.fit == "crop"):
        return to_width, max(int(to_width * height / width), 1)
    return max(int(to_height * width / height), 1), to_height


def _fit(image: Image.Image, resized: tuple[int, int], spec: ImageSpec, orientation: int) -> Image.Image:
    """The centre of the image resized to `resized`, on black where that is smaller than the result.

    Going from the kept box to the result in one step equals resizing and cutting, without the huge
    intermediate image that a banner of 10,000 x 1 would need.
    """
    target, filter_ = _find_target_size(spec, orientation), Resampling[spec.resample.upper()]
    shown = min(resized[0], target[0]), min(resized[1], target[1])
    x, y = orientation in MIRRORED_X, orientation in MIRRORED_Y
    column, row = (resized[0] - shown[0] + x) // 2, (resized[1] - shown[1] + y) // 2
    across, down = image.width / resized[0], image.height / resized[1]
    left, right = column * across, min((column + shown[0]) * across, image.width)
    top, bottom = row * down, min((row + shown[1]) * down, image.height)
    # Pillow resizes rows before columns: a strip of 1 x 60 million pixels would be widened in full length.
    if shown[0] > right - left and shown[1] < bottom - top:
        image = image.resize((image.width, shown[1]), filter_, box=(0, top, image.width, bottom))
        top, bottom = 0, shown[1]
    image = image.resize(shown, filter_, box=(left, top, right, bottom))
    if shown == target:
        return image
    black = Image.new(image.mode, target)
    black.paste(image, ((target[0] - shown[0] + x) // 2, (target[1] - shown[1] + y) // 2))
    return black


def _convert_to_8_bit(image: Image.Image) -> Image.Image:
    """Any mode as RGB, or as L where it is grey: what can be resized without changing its meaning."""
    if image.mode.startswith(("I", "F")):
        return _scale_to_8_bit(image)
    if image.has_transparency_data:
        return _composite_over_white(image)
    if image.mode in ("RGB", "L"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _composite_over_white(image: Image.Image) -> Image.Image:
    """Composite an image with transparency over white."""
    rgba = image.convert("RGBA")
    white = Image.new("RGB", rgba.size, (255, 255, 255))
    white.paste(rgba, mask=rgba)
    return white


def _scale_to_8_bit(image: Image.Image) -> Image.Image:
    """Scale grey of 16 bits, 32 bits or floats to 8.

    16-bit files use their whole range. Signed, 32-bit and float files do not state theirs: it is the smallest
    of WIDE_RANGES, or their own maximum, that holds every value, from their minimum if that is negative.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0.0, neginf=0.0)
    low, high = min(float(values.min()), 0.0), float(values.max())
    ranges = WIDE_RANGES["I;16" if image.format == "PPM" else image.mode]  # PGM: Pillow scales it to 16 bits
    high = next((top for top in ranges if high <= top), high)
    values -= low
    values *= 255.0 / (high - low)
    return Image.fromarray(values.round().astype(np.uint8))
