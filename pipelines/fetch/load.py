"""Where images are -> rows of `schema.LOADED` with their pixels: the one path from a URI to pixels.

Classification, training, evaluation and `predict` all load through it; they differ in who decodes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa

from pipelines import metrics
from pipelines.fetch.fetch import Fetcher
from pipelines.fetch.source import Fetched, Source
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

Item = tuple[int, Source]
"""An image's id in the plan, and where its bytes are."""

Row = dict[str, object]
"""One image by the columns of `schema.LOADED`."""


class Arrival(NamedTuple):
    """A fetched image, and its place in a table."""

    position: int
    item_id: int
    source: Source
    fetched: Fetched


def load(
    fetcher: Fetcher, sources: Sequence[Source], *, item_ids: Sequence[int], spec: ImageSpec, decode: Decode
) -> pa.Table:
    """Fetch and decode: rows of `schema.LOADED` and the column `pixels`, in the order of `sources`.

    An image that cannot be used keeps its row, with the status that says why, and black pixels.
    """
    pixels_nhwc = black_pixels(len(sources), spec)
    rows: list[Row] = [{}] * len(sources)
    for batch in fetcher.fetch_batches(sources):
        arrivals = (Arrival(index, item_ids[index], sources[index], fetched) for index, fetched in batch)
        for position, row in _load_batch(list(arrivals), pixels_nhwc, decode):
            rows[position] = row
    return _table(rows, pixels_nhwc)


def load_as_they_arrive(
    fetcher: Fetcher,
    items: Iterable[Item],
    *,
    rows_per_table: int,
    spec: ImageSpec,
    decode: Decode,
    knows: Knows,
) -> Iterator[pa.Table]:
    """Yield what `load` does for items in tables of so many rows: a slow image keeps no other one waiting.

    At most two tables' images are under way, and as many may be slow before the others wait. One that is as
    an earlier night had it, or whose bytes are known, is not decoded: its status is in `status.CARRIED`.
    """
    under_way: dict[int, Item] = {}

    def start() -> Iterator[Source]:
        for index, item in enumerate(items):
            under_way[index] = item
            yield item[1]

    rows: list[Row] = []
    pixels_nhwc = black_pixels(rows_per_table, spec)
    for batch in fetcher.fetch_batches(start(), window=2 * rows_per_table):
        while batch:
            taken = batch[: rows_per_table - len(rows)]
            del batch[: len(taken)]
            arrivals = (
                Arrival(position, *under_way.pop(index), fetched)
                for position, (index, fetched) in enumerate(taken, start=len(rows))
            )
            rows += [row for _, row in _load_batch(list(arrivals), pixels_nhwc, decode, knows)]
            taken.clear()  # before others wait for the memory of its payloads
            if len(rows) == rows_per_table:
                yield _table(rows, pixels_nhwc)
                rows, pixels_nhwc = [], black_pixels(rows_per_table, spec)
    if rows:
        yield _table(rows, pixels_nhwc[: len(rows)])


def _table(rows: list[Row], pixels_nhwc: Pixels) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=LOADED).append_column("pixels", pixels_column(pixels_nhwc))


def decode_here(spec: ImageSpec, limits: DecodeLimits | None = None) -> Decode:
    """A `Decode` that runs in the calling process."""

    def decode(payloads: Sequence[bytes], pixels_nhwc: Pixels, positions: Sequence[int]) -> list[Prepared]:
        outcomes = [prepare(payload, spec, limits) for payload in payloads]
        for position, outcome in zip(positions, outcomes, strict=True):
            if outcome.pixels_hwc is not None:
                pixels_nhwc[position] = outcome.pixels_hwc
        return outcomes

    return decode


def _find_known(arrival: Arrival, knows: Knows | None) -> Row | None:
    """The row of an image whose result is known without decoding it, or None."""
    fetched, earlier = arrival.fetched, arrival.source.earlier
    if fetched.not_modified and earlier:
        return {"status": NOT_MODIFIED, "sha256": earlier.sha256}
    if knows and fetched.sha256 and knows(fetched.sha256):
        return {"status": SAME_BYTES, "sha256": fetched.sha256}
    return None


def _load_batch(
    arrivals: Sequence[Arrival], pixels_nhwc: Pixels, decode: Decode, knows: Knows | None = None
) -> list[tuple[int, Row]]:
    """The rows of a batch by position: what is known of an image, or what decoding made of its payload."""
    known = [_find_known(arrival, knows) for arrival in arrivals]
    payloads = {
        arrival.position: arrival.fetched.payload
        for arrival, row in zip(arrivals, known, strict=True)
        if arrival.fetched.payload is not None and not row
    }
    metrics.count("bytes_fetched", sum(map(len, payloads.values())))
    prepared = decode(list(payloads.values()), pixels_nhwc, list(payloads)) if payloads else ()
    images = dict(zip(payloads, prepared, strict=True))
    rows = [
        _without_bytes(row or _row(arrival.fetched, images.get(arrival.position)), arrival.source)
        for arrival, row in zip(arrivals, known, strict=True)
    ]
    return [
        (arrival.position, {"item_id": arrival.item_id, **row, **_response(arrival.fetched)})
        for arrival, row in zip(arrivals, rows, strict=True)
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
