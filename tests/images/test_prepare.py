"""Whatever a publisher serves becomes upright RGB pixels or a status; nothing raises."""

import csv
import io
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFile, ImageOps

from pipelines.images.formats import sniff
from pipelines.images.prepare import Prepared, prepare
from pipelines.specs import DecodeLimits, ImageSpec
from pipelines.status import Status

SPEC = ImageSpec(height=48, width=64)
WHITE, RED = (255, 255, 255), (255, 0, 0)


def encode(image: Image.Image, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def picture(size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Four corners of four colours over a gradient: every flip and turn shows."""
    width, height = size
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    draw = ImageDraw.Draw(image)
    corners = [((0, 0), RED), ((1, 0), (0, 255, 0)), ((0, 1), (0, 0, 255)), ((1, 1), (255, 255, 0))]
    for (right, low), colour in corners:
        left, top = right * width * 2 // 3, low * height * 2 // 3
        draw.rectangle((left, top, left + width // 3, top + height // 3), fill=colour)
    return image


def pixels(payload: bytes, spec: ImageSpec = SPEC, limits: DecodeLimits | None = None) -> np.ndarray:
    outcome = prepare(payload, spec, limits)
    assert outcome.status is Status.OK, outcome.error
    assert outcome.pixels_hwc is not None
    return outcome.pixels_hwc


@pytest.mark.parametrize("name", ["ICO", "ICNS"])
def test_file_inside_an_icon_is_refused_by_its_header(name: str) -> None:
    icon = encode(Image.new("RGB", (256, 256)), name)
    large = icon.replace(struct.pack(">II", 256, 256), struct.pack(">II", 8_000, 8_000))
    assert large != icon
    assert prepare(icon, SPEC).status is Status.OK
    outcome = prepare(large, SPEC, DecodeLimits(max_pixels=1_000_000))
    assert outcome.status is Status.TOO_MANY_PIXELS
    assert "8000 x 8000" in (outcome.error or "")


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


def reference(image: Image.Image, spec: ImageSpec = SPEC) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((spec.width, spec.height), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("name", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000"])
def test_every_promised_format_shows_the_picture(name: str) -> None:
    options = {"quality": 95} if name in ("JPEG", "WEBP", "AVIF") else {}
    outcome = prepare(encode(picture(), name, **options), SPEC)
    assert (outcome.status, outcome.width_px, outcome.height_px) == (Status.OK, 320, 240)
    assert outcome.format == name.lower()
    assert outcome.pixels_hwc is not None
    assert outcome.pixels_hwc.shape == (48, 64, 3)
    assert outcome.pixels_hwc.dtype == np.uint8
    assert outcome.pixels_hwc.flags.c_contiguous
    assert difference(outcome.pixels_hwc, reference(picture())) < 4


def test_heif_is_decoded_where_its_plugin_is_installed() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    outcome = prepare(encode(picture(), "HEIF", quality=95), SPEC)
    assert outcome.format == "heif"
    assert outcome.pixels_hwc is not None
    assert difference(outcome.pixels_hwc, reference(picture())) < 4


def test_every_file_that_pillow_loads_whole_is_ok(tricky: Path) -> None:
    sensible = {
        Status.TRUNCATED,
        Status.DECODE_FAILED,
        Status.NOT_AN_IMAGE,
        Status.UNSUPPORTED_FORMAT,
        Status.TOO_MANY_PIXELS,
    }
    for record in csv.DictReader((tricky / "files.csv").open()):
        with warnings.catch_warnings(action="ignore"):
            outcome = prepare((tricky / record["file"]).read_bytes(), SPEC)
        if record["pillow_loads"] == "1":
            assert outcome.status is Status.OK, (record["file"], outcome.error)
        elif outcome.status is not Status.OK:
            assert outcome.status in sensible
            assert outcome.error
            assert "\n" not in outcome.error
        if record["sniffed_format"] == "SVG":
            assert (outcome.status, outcome.format) == (Status.UNSUPPORTED_FORMAT, "svg")
        if "huge-dimensions" in record["peculiarity"] and record["pillow_loads"] == "skipped":
            assert outcome.status in (Status.TOO_MANY_PIXELS, Status.TRUNCATED)


def test_scaled_jpeg_decoding_stays_close_to_the_full_one(photos: Path) -> None:
    spec = ImageSpec()
    files = sorted(photos.glob("*/*.jpg"))[::40]
    differences = [difference(pixels(f.read_bytes(), spec), reference(Image.open(f), spec)) for f in files]
    assert np.mean(differences) < 0.5
    assert max(differences) < 3


def test_scaled_jpeg_decoding_never_goes_below_the_target() -> None:
    fine = Image.effect_noise((1601, 1203), 60).convert("RGB")
    spec = ImageSpec(height=150, width=200)
    payload = encode(fine, "JPEG", quality=95)
    full = reference(Image.open(io.BytesIO(payload)), spec)
    assert difference(pixels(payload, spec), full) < 5  # noise is the worst case
    # a decoder that had gone below the target would have lost contrast
    assert pixels(payload, spec).std() > 0.9 * full.std()


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, name: str, fit: str) -> None:
    spec = ImageSpec(height=48, width=64, fit=fit)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {} if name in ("PNG", "TIFF") else {"quality": 95}
    payload = encode(picture((320, 200)), name, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(payload)))
    outcome = prepare(payload, spec)
    assert outcome.pixels_hwc is not None
    assert difference(outcome.pixels_hwc, pixels(encode(upright, "PNG"), spec)) < 1.5
    assert (outcome.width_px, outcome.height_px) == (320, 200)


def test_damaged_exif_does_not_cost_the_picture() -> None:
    payload = encode(picture(), "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff\0\0")
    assert difference(pixels(payload), reference(picture())) < 4


def test_transparency_is_laid_over_white() -> None:
    clear = Image.new("RGBA", (80, 60), (255, 0, 0, 0))
    ImageDraw.Draw(clear).rectangle((0, 0, 39, 59), fill=(255, 0, 0, 255))
    for payload in (encode(clear, "PNG"), encode(clear, "WEBP", lossless=True), encode(clear, "TIFF")):
        shown = pixels(payload)
        assert tuple(shown[24, 2]) == RED
        assert tuple(shown[24, 61]) == WHITE


def test_half_transparent_black_is_grey() -> None:
    shown = pixels(encode(Image.new("LA", (8, 8), (0, 127)), "PNG"))
    assert np.all(np.abs(shown.astype(int) - 128) <= 1)


def test_transparent_palette_entries_are_white() -> None:
    for name in ("PNG", "GIF"):
        palette = Image.new("P", (80, 60), 0)
        palette.putpalette([255, 0, 0, 0, 0, 255])
        ImageDraw.Draw(palette).rectangle((40, 0, 79, 59), fill=1)
        shown = pixels(encode(palette, name, transparency=1))
        assert tuple(shown[24, 2]) == RED
        assert tuple(shown[24, 61]) == WHITE


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (1, 2, 3)), ("L", 7)])
def test_a_transparent_colour_is_white(mode: str, colour: object) -> None:
    image = Image.new(mode, (8, 8), colour)
    assert np.all(pixels(encode(image, "PNG", transparency=colour)) == 255)


@pytest.mark.parametrize("name", ["JPEG", "TIFF"])
def test_cmyk_shows_its_colours(name: str) -> None:
    colours = picture().convert("CMYK")
    assert difference(pixels(encode(colours, name)), reference(picture())) < 4


def test_inverted_adobe_ycck_shows_its_colours(tricky: Path) -> None:
    """A blue book cover, and red letters on black."""
    cover = pixels((tricky / "TwelveMonkeys__cmyk-sample.jpg").read_bytes())
    assert cover[2, 2, 2] > 150
    assert cover[2, 2, 0] < 60
    letters = pixels((tricky / "Pillow__pil_sample_cmyk.jpg").read_bytes())
    assert np.median(letters) < 30
    assert letters[..., 0].max() > 200
    assert letters[..., 2].max() < 60


def grey_ramp(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.tile(np.linspace(0, 1, 256), (64, 1)).astype(np.float32) * values)


@pytest.mark.parametrize(
    ("name", "dtype", "white"),
    [
        ("PNG", np.uint16, 65535),
        ("TIFF", np.uint16, 65535),
        ("TIFF", np.int32, 255),
        ("TIFF", np.int32, 32767),
        ("TIFF", np.int32, 65535),
        ("TIFF", np.int32, 2_000_000_000),
        ("TIFF", np.float32, 1.0),
        ("TIFF", np.float32, 255.0),
        ("TIFF", np.float32, 1e6),
    ],
)
def test_deep_grey_keeps_its_brightness(name: str, dtype: type, white: float) -> None:
    ramp = (np.tile(np.linspace(0, 1, 256), (64, 1)) * white).astype(dtype)
    shown = pixels(encode(Image.fromarray(ramp), name))
    assert (
        difference(shown[..., 0], reference(Image.fromarray((ramp / white * 255).astype(np.uint8)))[..., 0])
        < 1.5
    )


def test_dark_16_bit_pgm_stays_dark() -> None:
    payload = b"P5 4 4 65535\n" + np.full((4, 4), 200, ">u2").tobytes()
    assert pixels(payload).max() <= 1


def test_floats_that_are_no_numbers_are_black() -> None:
    values = np.full((8, 8), np.nan, np.float32)
    values[:, 4:] = 1.0
    shown = pixels(encode(Image.fromarray(values), "TIFF"))
    assert shown[24, 2].max() == 0
    assert shown[24, 61].min() == 255


def test_grey_and_one_bit_pictures_are_antialiased_rgb() -> None:
    grey = picture().convert("L")
    assert difference(pixels(encode(grey, "JPEG", quality=95)), reference(grey)) < 3
    checks = Image.fromarray((np.indices((480, 640)).sum(axis=0) % 2).astype(bool))
    assert np.all(np.abs(pixels(encode(checks, "PNG")).astype(int) - 127) < 20)


@pytest.mark.parametrize("name", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_several_is_taken(name: str) -> None:
    first, second = Image.new("RGB", (20, 20), RED), Image.new("RGB", (20, 20), (0, 0, 255))
    options = {"lossless": True} if name == "WEBP" else {}
    shown = pixels(encode(first, name, save_all=True, append_images=[second], **options))
    assert np.all(shown == RED)


@pytest.mark.parametrize("size", [(1, 1), (60_000, 1), (1, 60_000), (3, 7)])
@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_extreme_shapes_are_resized_in_little_time(size: tuple[int, int], fit: str) -> None:
    payload = encode(Image.new("L", size, 255), "PNG")
    started = time.process_time()
    shown = pixels(payload, ImageSpec(height=48, width=64, fit=fit))
    assert np.all(shown.max(axis=(0, 1)) == 255)
    assert fit == "pad" or np.all(shown == 255)
    assert time.process_time() - started < 0.5


def test_a_narrow_strip_shrinks_as_it_would_in_one_step() -> None:
    strip = picture((40, 3000))
    assert difference(pixels(encode(strip, "PNG")), reference(strip)) < 0.5


@pytest.mark.parametrize("size", [(320, 240), (240, 320), (1500, 700)])
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_crop_is_resizing_the_shorter_side_and_cutting_the_centre(
    size: tuple[int, int], resample: str
) -> None:
    spec = ImageSpec(height=60, width=60, fit="crop", resample=resample)
    image = picture(size)
    expected = cut_from_the_centre(image, 60, spec)
    assert difference(pixels(encode(image, "PNG"), spec), expected) == 0
    assert difference(pixels(encode(image, "JPEG", quality=95), spec), expected) < 4


def cut_from_the_centre(image: Image.Image, shorter: int, spec: ImageSpec) -> np.ndarray:
    """As torchvision and transformers resize the shorter side and cut."""
    longer = int(shorter * max(image.size) / min(image.size))
    size = (shorter, longer) if image.width <= image.height else (longer, shorter)
    resized = image.resize(size, Image.Resampling[spec.resample.upper()])
    left, top = (resized.width - spec.width) // 2, (resized.height - spec.height) // 2
    return np.asarray(resized.crop((left, top, left + spec.width, top + spec.height)))


@pytest.mark.parametrize("size", [(320, 240), (241, 333), (1501, 700)])
def test_crop_fraction_cuts_the_centre_of_a_larger_resize(size: tuple[int, int]) -> None:
    image, payload = picture(size), encode(picture(size), "PNG")
    crop = ImageSpec(height=56, width=56, fit="crop", resample="bicubic", crop_fraction=0.875)
    assert difference(pixels(payload, crop), cut_from_the_centre(image, 64, crop)) == 0
    squashed = cut_from_the_centre(image.resize((64, 64), Image.Resampling.LANCZOS), 64, crop)
    stretch = ImageSpec(height=56, width=56, resample="lanczos", crop_fraction=0.875)
    assert difference(pixels(payload, stretch), squashed) == 0


def test_pad_keeps_the_shape_on_black() -> None:
    spec = ImageSpec(height=48, width=64, fit="pad")
    expected = ImageOps.pad(picture((200, 400)), (64, 48), Image.Resampling.BILINEAR, color="black")
    assert difference(pixels(encode(picture((200, 400)), "PNG"), spec), np.asarray(expected)) == 0
    with pytest.raises(ValueError, match="and fit is pad"):
        ImageSpec(fit="pad", crop_fraction=0.9)


def png_of_claimed_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_of_claimed_size(width: int, height: int) -> bytes:
    payload = bytearray(encode(picture(), "JPEG"))
    start = payload.index(b"\xff\xc0")
    payload[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(payload)


@pytest.mark.parametrize("claim", [png_of_claimed_size, jpeg_of_claimed_size])
@pytest.mark.parametrize("size", [(65535, 65535), (60_000, 6_000)])
def test_too_many_pixels_are_refused_by_the_header_alone(claim, size: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    started = time.process_time()
    outcome = prepare(claim(*size), SPEC)
    assert outcome.status is Status.TOO_MANY_PIXELS
    assert time.process_time() - started < 0.2


def test_the_pixel_limit_is_named_with_the_size() -> None:
    outcome = prepare(encode(picture(), "PNG"), SPEC, DecodeLimits(max_pixels=76_799))
    assert outcome.error == "320 x 240 pixels; the limit is 76799 (max_pixels)"
    assert (outcome.width_px, outcome.height_px, outcome.format) == (320, 240, "png")
    assert prepare(encode(picture(), "PNG"), SPEC, DecodeLimits(max_pixels=76_800)).status is Status.OK


def test_a_tiny_file_cannot_claim_millions_of_rows() -> None:
    outcome = prepare(png_of_claimed_size(1, 67_000_000), SPEC)
    assert outcome.status is Status.TOO_MANY_PIXELS
    assert outcome.error == "1 x 67000000 pixels; the longest side allowed is 65535 (max_side)"


@pytest.mark.parametrize(
    ("payload", "status", "name"),
    [
        (b"", Status.EMPTY, None),
        (b"\0" * 1000, Status.NOT_AN_IMAGE, None),
        (b"<!DOCTYPE html><html><body>404</body></html>", Status.NOT_AN_IMAGE, None),
        (b"<html><svg></svg></html>", Status.NOT_AN_IMAGE, None),
        (b"%PDF-1.7", Status.NOT_AN_IMAGE, None),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", Status.NOT_AN_IMAGE, None),
        (
            b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
            Status.UNSUPPORTED_FORMAT,
            "svg",
        ),
        (b"\xff\x0a" + b"\0" * 40, Status.UNSUPPORTED_FORMAT, "jpegxl"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", Status.UNSUPPORTED_FORMAT, "eps"),
        (b"\xff\xd8\xff\xe0", Status.DECODE_FAILED, "jpeg"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, Status.DECODE_FAILED, "png"),
    ],
)
def test_what_is_no_picture_says_what_it_is(payload: bytes, status: Status, name: str | None) -> None:
    outcome = prepare(payload, SPEC)
    assert (outcome.status, outcome.format, outcome.pixels_hwc) == (status, name, None)
    assert outcome.error


def test_html_behind_a_jpeg_is_still_the_jpeg() -> None:
    assert prepare(encode(picture(), "JPEG") + b"<html>", SPEC).status is Status.OK


@pytest.mark.parametrize("name", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_cut_file_is_truncated_or_failed_and_never_ok(name: str) -> None:
    whole = encode(Image.effect_noise((320, 240), 90).convert("RGB"), name)
    statuses = [prepare(whole[: len(whole) * tenth // 10], SPEC).status for tenth in range(1, 10)]
    assert set(statuses) <= {Status.TRUNCATED, Status.DECODE_FAILED}
    if name != "TIFF":  # libtiff does not say why it failed
        assert set(statuses) == {Status.TRUNCATED}


def test_pillow_is_left_as_strict_as_it_was() -> None:
    prepare(encode(picture(), "JPEG")[:2000], SPEC)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


HEADS = [
    b"",
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF89a",
    b"RIFF\x40\0\0\0WEBP",
    b"BM",
    b"II*\0",
    b"8BPS",
]


@given(head=st.sampled_from(HEADS), rest=st.binary(max_size=300))
def test_arbitrary_bytes_get_a_status(head: bytes, rest: bytes) -> None:
    outcome = prepare(head + rest, SPEC)
    assert isinstance(outcome, Prepared)
    assert (outcome.status is Status.OK) == (outcome.pixels_hwc is not None) == (outcome.error is None)
    sniff(head + rest)
