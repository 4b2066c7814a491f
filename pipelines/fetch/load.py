"""Where images are -> rows of `schema.LOADED` with their pixels: the one path from a URI to pixels.

Classification, training, evaluation and `predict` all load through it; they differ in who decodes.
"""

from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa

from pipelines import metrics
from pipelines.fetch.fetch import Fetcher
from pipelines.fetch.source import Batch, Fetched, Source
from pipelines.images.pixels import black_pixels, pixels_column
from pipelines.images.prepare import Pixels, Prepared, prepare
from pipelines.schema import LOADED
from pipelines.specs import DecodeLimits, ImageSpec
from pipelines.status import NOT_MODIFIED, SAME_BYTES, Status
from pipelines.storage.uris import scheme_of

Decode = Callable[[Sequence[bytes], Pixels, Sequence[int]], Sequence[Prepared]]
"""Decodes payloads into these positions of uint8 [n, height, width, 3]; returns one outcome per payload."""

Knows = Callable[[str], bool]
"""Whether the result of the bytes with this sha256 is known."""

Row = dict[str, object]
"""One image by the columns of `schema.LOADED`."""


def load(
    fetcher: Fetcher,
    sources: Sequence[Source],
    *,
    item_ids: Sequence[int],
    spec: ImageSpec,
    decode: Decode,
    knows: Knows | None = None,
) -> pa.Table:
    """Fetch and decode: rows of `schema.LOADED` and the column `pixels`, in the order of `sources`.

    An image that cannot be used keeps its row, with the status that says why, and black pixels. One that is
    as an earlier night had it, or whose bytes are known, is not decoded: its status is in `status.CARRIED`.
    """
    pixels_nhwc = black_pixels(len(sources), spec)
    rows: list[Row] = [{}] * len(sources)
    for batch in fetcher.fetch_batches(sources):
        known = {index: _find_known(fetched, sources[index], knows) for index, fetched in batch}
        for index, row in _load_batch(batch, known, pixels_nhwc, decode):
            rows[index] = {"item_id": item_ids[index], **_without_bytes(row, sources[index])}
    table = pa.Table.from_pylist(rows, schema=LOADED)
    return table.append_column("pixels", pixels_column(pixels_nhwc))


def decode_here(spec: ImageSpec, limits: DecodeLimits | None = None) -> Decode:
    """A `Decode` that runs in the calling process."""

    def decode(payloads: Sequence[bytes], pixels_nhwc: Pixels, positions: Sequence[int]) -> list[Prepared]:
        outcomes = [prepare(payload, spec, limits) for payload in payloads]
        for position, outcome in zip(positions, outcomes, strict=True):
            if outcome.pixels_hwc is not None:
                pixels_nhwc[position] = outcome.pixels_hwc
        return outcomes

    return decode


def _find_known(fetched: Fetched, source: Source, knows: Knows | None) -> Row | None:
    """The row of an image whose result is known without decoding it, or None."""
    if fetched.not_modified and source.earlier:
        return {"status": NOT_MODIFIED, "sha256": source.earlier.sha256}
    if knows and fetched.sha256 and knows(fetched.sha256):
        return {"status": SAME_BYTES, "sha256": fetched.sha256}
    return None


def _load_batch(
    batch: Batch, known: Mapping[int, Row | None], pixels_nhwc: Pixels, decode: Decode
) -> list[tuple[int, Row]]:
    """The rows of a batch: what is known of an image, or what decoding made of its payload."""
    payloads = {
        index: fetched.payload for index, fetched in batch if fetched.payload is not None and not known[index]
    }
    metrics.count("bytes_fetched", sum(map(len, payloads.values())))
    prepared = decode(list(payloads.values()), pixels_nhwc, list(payloads)) if payloads else ()
    images = dict(zip(payloads, prepared, strict=True))
    return [
        (index, (known[index] or _row(fetched, images.get(index))) | _response(fetched))
        for index, fetched in batch
    ]


def _without_bytes(row: Row, source: Source) -> Row:
    """The row; of a file that is no image, only web servers' bytes may be quoted in a published table."""
    if row["status"] != Status.NOT_AN_IMAGE.value or scheme_of(source.location) in ("http", "https"):
        return row
    return {**row, "error": "no image format starts like this"}


def _response(fetched: Fetched) -> Row:
    """What the server said of the bytes."""
    if not (validator := fetched.validator):
        return {}
    return {"etag": validator.etag, "last_modified": validator.last_modified}


def _row(fetched: Fetched, image: Prepared | None) -> Row:
    """What became of one image; `image` is what decoding made of its payload, if there is one."""
    if image is None:
        return {
            "status": fetched.status.value,
            "error": fetched.error,
            "retry_after_s": fetched.retry_after_s,
        }
    return {
        "status": image.status.value,
        "error": image.error,
        "sha256": fetched.sha256,
        "width_px": image.width_px,
        "height_px": image.height_px,
        "format": image.format,
    }
