"""Where images are -> rows of `schema.LOADED` with their pixels: the one path from a URI to pixels.

Classification, training, evaluation and `predict` all load through it; they differ in who decodes.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

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

Item = tuple[int, Source]
"""An image's id in the plan, and where its bytes are."""

Row = dict[str, object]
"""One image by the columns of `schema.LOADED`."""


LATE_S = 2.0
"""How long a table waits for a further image, seconds, before it is handed on without those that are late."""

MOST_OPEN = 8
"""Tables of one call that may wait for images: each holds its pixels."""


class Arrival(NamedTuple):
    """A fetched image, and its place in a table."""

    position: int
    item_id: int
    source: Source
    fetched: Fetched


class OpenTable:
    """A table of `size` images, some of which are still under way."""

    def __init__(self, size: int, spec: ImageSpec, opened_at: float = 0.0) -> None:
        self.rows: list[Row] = []
        self.changed_at = opened_at
        self._pixels_nhwc = black_pixels(size, spec)
        self.room = size

    def add(
        self, images: Sequence[tuple[Item, Fetched]], decode: Decode, knows: Knows | None, now: float
    ) -> None:
        """Take as many images, at most, as there is room for."""
        arrivals = [
            Arrival(position, *item, fetched)
            for position, (item, fetched) in enumerate(images, start=len(self.rows))
        ]
        self.rows += [row for _, row in _load_batch(arrivals, self._pixels_nhwc, decode, knows)]
        self.room -= len(arrivals)
        self.changed_at = now

    def close(self) -> pa.Table:
        """The images that have arrived, in the order in which they did."""
        return _table(self.rows, self._pixels_nhwc[: len(self.rows)])


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
        arrivals = (Arrival(index, item_ids[index], sources[index], fetched) for index, fetched in batch)
        for position, row in _load_batch(list(arrivals), pixels_nhwc, decode, knows):
            rows[position] = row
    return _table(rows, pixels_nhwc)


class BatchLoader:
    """Loads one batch after the other without waiting for the slowest image of each.

    A batch becomes one table, so that a part of the predictions holds few ranges of items. Where images are
    late, it is handed on without them; they come in tables of their own.
    """

    def __init__(
        self, fetcher: Fetcher, *, rows_per_table: int, spec: ImageSpec, decode: Decode, knows: Knows
    ) -> None:
        self._fetcher, self._rows_per_table, self._spec = fetcher, rows_per_table, spec
        self._decode, self._knows = decode, knows
        self._open: dict[int, OpenTable] = {}
        """By number of the batch, the oldest first."""
        self._under_way: dict[int, tuple[int, Item]] = {}
        """The number of the batch and the item of each image, by the index of its source."""
        self._late = OpenTable(rows_per_table, spec)
        self._waited_s = 0.0
        """For images: not for whoever takes the tables."""

    def load(self, batches: Iterable[Sequence[Item]]) -> Iterator[pa.Table]:
        """Yield tables as `load` returns them, each with at most `rows_per_table` rows.

        As many images as a table has are under way; so many may be slow before the others wait.
        """
        sources, window = self._start(batches), self._rows_per_table
        arriving = self._fetcher.fetch_batches(sources, window=window, wait_s=LATE_S)
        while True:
            began = time.monotonic()
            batch = next(arriving, None)
            self._waited_s += time.monotonic() - began
            if batch is None:
                break
            yield from self._add(batch)
            yield from self._hand_on()
        if self._late.rows:
            yield self._late.close()

    def _start(self, batches: Iterable[Sequence[Item]]) -> Iterator[Source]:
        index = itertools.count()
        for number, batch in enumerate(batches):
            self._open[number] = OpenTable(len(batch), self._spec, self._waited_s)
            for item in batch:
                self._under_way[next(index)] = number, item
                yield item[1]

    def _add(self, batch: Batch) -> Iterator[pa.Table]:
        """Decode images into their tables; yields the tables of late ones that they fill."""
        by_table: dict[int, list[tuple[Item, Fetched]]] = {}
        for index, fetched in batch:
            number, item = self._under_way.pop(index)
            by_table.setdefault(number, []).append((item, fetched))
        for number, images in by_table.items():
            if table := self._open.get(number):
                table.add(images, self._decode, self._knows, self._waited_s)
            else:
                yield from self._add_late(images)

    def _add_late(self, images: Sequence[tuple[Item, Fetched]]) -> Iterator[pa.Table]:
        while images:
            taken, images = images[: self._late.room], images[self._late.room :]
            self._late.add(taken, self._decode, self._knows, self._waited_s)
            if not self._late.room:
                yield self._late.close()
                self._late = OpenTable(self._rows_per_table, self._spec)

    def _hand_on(self) -> Iterator[pa.Table]:
        """Yield the tables that are whole, and those that wait no longer."""
        for number, table in list(self._open.items()):
            late = self._waited_s - table.changed_at >= LATE_S or len(self._open) > MOST_OPEN
            if late or not table.room:
                del self._open[number]
                if table.rows:
                    yield table.close()


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
