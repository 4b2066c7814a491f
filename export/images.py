"""The images that parity is measured on: a seeded sample of the user's own, and edge cases made here.

Both as encoded bytes, since what is certified begins with bytes. The user's images come from a labelled
dataset (its validation and test splits where it has them), a table of URIs, or any folder of images.
"""

import hashlib
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.datasets import readers
from pipelines.datasets.dataset import rename_labels
from pipelines.datasets.errors import DatasetError
from pipelines.datasets.pixels import fetcher
from pipelines.datasets.settings import Columns
from pipelines.datasets.splits import ALIASES, TEST, TRAIN, VALIDATION
from pipelines.evaluation.eval_set import find_covering_class
from pipelines.fetch.source import LOCATION, Source
from pipelines.images.decoder import DecoderProcess
from pipelines.images.formats import is_image_name
from pipelines.images.prepare import ORIENTATION_TAG
from pipelines.inventory import tables
from pipelines.inventory.listing import absolute
from pipelines.messages import InputError, redact
from pipelines.specs import ImageSpec
from pipelines.status import Status
from pipelines.storage import storage, uris
from pipelines.taxonomy.taxonomy import AmbiguousLabel, Taxonomy, UnknownLabel
from pipelines.training import runs

HELD_OUT = (VALIDATION, TEST)
"""Splits that training never saw, so accuracy on them means something."""
DATASET_TABLE = "labels.csv"
"""Says which image of its folder is what, where no folders of classes do."""
DECODE_BATCH = 64

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One encoded image."""

    image_id: str
    payload: bytes
    labels: tuple[str, ...] = ()
    """As the dataset has them; none for an unlabelled image or an edge case."""
    edge_case: bool = False
    split: str | None = None
    """Where the dataset or the model's run has it, if they say."""

    @property
    def fingerprint(self) -> str:
        """Short hash of the bytes: what tells whether two measurements used the same image."""
        return hashlib.sha256(self.payload).hexdigest()[:16]


@dataclass(frozen=True)
class Place:
    """Where one image of the user is."""

    uri: str
    labels: tuple[str, ...] = ()
    source: Source | None = None
    """Where the bytes are, unless at `uri`."""
    split: str | None = None
    """`train`, `validation` or `test`, if the dataset or the model's run says."""


@dataclass(frozen=True)
class OwnImages:
    """The user's images, and how labels are read: unset as in the model's run, if it had this dataset."""

    uri: str
    columns: Columns | None = None
    label_map: str | None = None


def draw(own: OwnImages, *, count: int, seed: int, run: str | None = None) -> list[Sample]:
    """`count` of the images that can be read: the same ones for the same seed, held-out ones first.

    Args:
        run: folder of the model's run; what it recorded says which images are held out, and its columns.
    """
    places = find(own, run)
    if not places:
        raise InputError(
            f"{redact(own.uri)} does not exist or holds no image; give a folder, a table or a dataset"
        )
    ranked = sorted(places, key=lambda one: (one.split == TRAIN, _draw_key(one, seed)))
    return _read(ranked, count)


def _draw_key(place: Place, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{place.uri}".encode()).digest()


def find(own: OwnImages, run: str | None = None) -> list[Place]:
    """Every image that may be drawn, in the split that the model's run recorded, else that of the dataset.

    Raises:
        DatasetError: a table that does not say where its images are, or a label map that does not exist.
    """
    recorded = (runs.recorded_splits(run) if run else None) or {}
    columns, label_map = _settings(own, run)
    found = _read_labelled(absolute(own.uri), columns)
    labels = rename_labels(found["labels"].to_pylist(), label_map)
    return [
        Place(
            row["uri"],
            tuple(names or ()),
            Source(*(row[name] for name in LOCATION)),
            recorded.get(redact(row["uri"]), ALIASES.get(str(row["split"]).strip().lower())),
        )
        for row, names in zip(found.to_pylist(), labels, strict=True)
    ]


def _settings(own: OwnImages, run: str | None) -> tuple[Columns, str | None]:
    """Columns and label map: as given, else as the run was told, if it had this dataset."""
    columns, label_map = own.columns, own.label_map
    recorded = runs.recorded_data_settings(run) if run else None
    if recorded and recorded.uri in (redact(own.uri), redact(absolute(own.uri))):
        columns, label_map = columns or recorded.columns, label_map or recorded.label_map
    return columns or Columns(), label_map


def _read_labelled(images_uri: str, columns: Columns) -> pa.Table:
    """The images in the schema FOUND, as `train` reads them; without labels where there are none."""
    is_table = tables.format_of(images_uri) is not None
    try:
        found, _ = readers.read(images_uri, columns)
        reason = "" if is_table or _has_classes(found) else "its folders name no two classes"
    except DatasetError as error:
        found, reason = None, str(error)
    if reason and not is_table and storage.open_storage(images_uri).exists(DATASET_TABLE):
        logger.info("%s: the images and labels are those of its %s", redact(images_uri), DATASET_TABLE)
        return _read_labelled(uris.join(images_uri, DATASET_TABLE), columns)
    if found is None:
        found = _in_table(images_uri, columns) if is_table else _in_folder(images_uri)
        if found.num_rows:
            logger.info("taken without labels: %s", reason)
    return found


def _has_classes(found: pa.Table) -> bool:
    """Whether the labels are more than the one folder, or the folders of splits, that the images are in."""
    labels = {label for names in found["labels"].to_pylist() for label in names or ()}
    return len({label for label in labels if label.lower() not in ALIASES}) > 1


def _in_table(table_uri: str, columns: Columns) -> pa.Table:
    """Its images without labels; raises DatasetError where it does not say where they are."""
    schema = tables.schema_of([table_uri])
    wanted = {*readers.FILE_COLUMNS, *readers.parse_template(columns.file), columns.split}
    raw = readers.read_columns(table_uri, schema, [name for name in schema.names if name in wanted])
    location = readers.locate(table_uri, schema, raw, columns)
    split = readers.text_of(raw, columns.split)
    return readers.make_found(location, [None] * len(location["uri"]), split=split)


def _in_folder(folder_uri: str) -> pa.Table:
    paths = (entry.path for entry in storage.open_storage(folder_uri).list())
    found = [uris.join(folder_uri, path) for path in filter(is_image_name, paths)]
    return readers.make_found({"uri": found}, [None] * len(found))


def targets(samples: Sequence[Sample], class_ids: Sequence[str], taxonomy: Taxonomy) -> np.ndarray:
    """0/1 matrix [samples, classes] of the labels; -1 where a label is missing or no class covers it.

    A label below a class counts as that class, as in `evaluate`.
    """
    labels = {label for sample in samples for label in sample.labels}
    covering = {one: find_covering_class(_resolved(one, taxonomy), class_ids, taxonomy) for one in labels}
    targets_nc = np.zeros((len(samples), len(class_ids)), np.int8)
    for row, sample in enumerate(samples):
        columns = [covering[label] for label in sample.labels]
        if not columns or -1 in columns:
            targets_nc[row] = -1
        else:
            targets_nc[row, columns] = 1
    return targets_nc


def _resolved(label: str, taxonomy: Taxonomy) -> str:
    try:
        return taxonomy.resolve(label)
    except (UnknownLabel, AmbiguousLabel):
        return ""


def _read(places: Sequence[Place], count: int) -> list[Sample]:
    """The first `count` that can be read; the others are logged, and the next are taken for them."""
    found: list[Sample] = []
    for start in range(0, len(places), count):
        found += _read_all(places[start : start + count])
        if len(found) >= count:
            break
    if not found:
        raise InputError(f"none of {len(places)} images can be read, such as {redact(places[0].uri)}")
    return found[:count]


def _read_all(places: Sequence[Place]) -> list[Sample]:
    payloads: dict[int, bytes] = {}
    sources = [place.source or Source(place.uri) for place in places]
    for index, fetched in fetcher().fetch_many(sources):
        if fetched.payload is None:
            logger.warning("left out %s: %s %s", redact(places[index].uri), fetched.status, fetched.error)
        else:
            payloads[index] = bytes(fetched.payload)
    return [
        Sample(place.uri, payloads[index], place.labels, split=place.split)
        for index, place in enumerate(places)
        if index in payloads
    ]


def decode(payloads: Sequence[bytes], spec: ImageSpec) -> list[np.ndarray | None]:
    """uint8 [height, width, 3] of each, or None; by classify's decoding processes, which survive a crash."""
    found: list[np.ndarray | None] = []
    with DecoderProcess(spec) as decoder:
        for start in range(0, len(payloads), DECODE_BATCH):
            prepared, pixels_nhwc = decoder.prepare_batch(payloads[start : start + DECODE_BATCH])
            pairs = zip(prepared, pixels_nhwc, strict=True)
            found += [pixels.copy() if image.status is Status.OK else None for image, pixels in pairs]
    return found


@cache
def edge_cases(seed: int = 0) -> tuple[Sample, ...]:
    """Pictures that have broken pipelines: tiny, huge, long, of one colour, CMYK, 16-bit, rotated, …"""
    picture = _picture(seed)
    grey, cmyk = picture.convert("L"), picture.convert("CMYK")
    made = {
        "tiny-1x1.png": _png(picture.resize((1, 1))),
        "tiny-3x2.jpg": _jpeg(picture.resize((3, 2))),
        "large-1280x960.jpg": _jpeg(picture.resize((1280, 960), Image.Resampling.BICUBIC)),
        "huge-4800x3600.jpg": _jpeg(picture.resize((4800, 3600), Image.Resampling.BICUBIC)),
        "long-2000x11.jpg": _jpeg(picture.resize((2000, 11))),
        "grey.jpg": _jpeg(grey),
        "cmyk.jpg": _jpeg(cmyk),
        "palette.png": _png(picture.quantize(64)),
        "grey-16-bit.png": _png(Image.fromarray(np.asarray(grey, np.uint16) * 257)),
        "transparent.png": _png(_transparent(picture)),
        "one-bit.png": _png(picture.convert("1")),
        "first-frame.gif": _gif(picture),
        **{f"rotated-{value}.jpg": _jpeg(picture, orientation=value) for value in (3, 6, 8)},
        **{f"{name}.png": _png(Image.new("RGB", picture.size, name)) for name in ("black", "white", "teal")},
        "checkerboard.png": _png(_checkerboard()),
        **{f"mirrored-{value}.jpg": _jpeg(picture, orientation=value) for value in (2, 5)},
    }
    return tuple(Sample(f"edge_case/{name}", payload, edge_case=True) for name, payload in made.items())


def _picture(seed: int) -> Image.Image:
    """Smooth colours with a bright corner: neither mirrored nor rotated does it look the same."""
    coarse_hwc = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    coarse_hwc[:2, :3] = (250, 40, 10)
    return Image.fromarray(coarse_hwc).resize((320, 240), Image.Resampling.BICUBIC)


def _checkerboard() -> Image.Image:
    """Squares of one pixel: grey when they are averaged, and anything but grey when they are picked."""
    squares_hw = np.indices((480, 640)).sum(axis=0) % 2 * 255
    return Image.fromarray(squares_hw.astype(np.uint8))


def _transparent(picture: Image.Image) -> Image.Image:
    picture = picture.convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    return picture


def _jpeg(picture: Image.Image, *, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    return _saved(picture, "JPEG", quality=90, exif=exif)


def _png(picture: Image.Image) -> bytes:
    return _saved(picture, "PNG")


def _gif(picture: Image.Image) -> bytes:
    second = picture.transpose(Image.Transpose.ROTATE_180)
    return _saved(picture, "GIF", save_all=True, append_images=[second], duration=100)


def _saved(picture: Image.Image, name: str, **settings: object) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, name, **settings)
    return sink.getvalue()
