"""The few images that a page shows: chosen among those classified that night, fetched again, made small.

The rest of the page needs no image; one that cannot be fetched or decoded again is shown without a picture.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import duckdb

from pipelines.fetch.fetch import Fetcher
from pipelines.fetch.settings import FetchLimits
from pipelines.fetch.source import Source, sources_of
from pipelines.images.decoder import DecoderProcess
from pipelines.images.pixels import jpeg_uri
from pipelines.inventory.plan import LOCATION, Plan
from pipelines.specs import ImageSpec
from pipelines.status import Status
from pipelines.storage.storage import open_storage

SIDE_PX = 144
"""Side of a picture on the page: 40 of them are 300 kB."""
LABELS_SHOWN = 3
PER_CATEGORY = 3
"""Most pictures of one category while there are others."""

BY_CATEGORY = """
SELECT sha256, images, tier1_id FROM (
    SELECT sha256, tier1_id, row_number() OVER (PARTITION BY tier1_id ORDER BY hash(sha256)) AS rank,
        count(*) OVER (PARTITION BY tier1_id) AS images
    FROM (SELECT DISTINCT sha256, tier1_id FROM classified)
) WHERE rank <= $per_category ORDER BY rank, images DESC, tier1_id LIMIT $n
"""
LEAST_CERTAIN = """
SELECT sha256 FROM (SELECT DISTINCT sha256, top_score FROM classified) ORDER BY top_score, 1 LIMIT $n
"""
CHOSEN = """
SELECT sha256, any_value(uri), any_value(tier1_id), any_value(labels) FROM rows
WHERE sha256 IN (SELECT unnest($chosen)) AND status = 'ok' GROUP BY sha256
"""


@dataclass(frozen=True)
class Picture:
    """One image with what the model said of it."""

    uri: str
    tier1_id: str
    labels: tuple[tuple[str, float], ...]
    """Ids and scores, best first."""
    thumbnail: str | None = None
    """A JPEG as a `data:` URI."""


@dataclass(frozen=True)
class Gallery:
    """The images of one page."""

    by_category: tuple[Picture, ...] = ()
    """Examples of the categories, those with the most images first."""
    least_certain: tuple[Picture, ...] = ()


def choose_pictures(database: duckdb.DuckDBPyConnection, n_pictures: int) -> Gallery:
    """Of what `open_night` opened: two thirds examples of categories, one third the least certain images."""
    n_least = n_pictures // 3
    per_category = {"per_category": PER_CATEGORY, "n": n_pictures - n_least}
    examples = database.execute(BY_CATEGORY, per_category).fetchall()
    examples.sort(key=lambda row: (-row[1], row[2]))
    by_category = [sha256 for sha256, *_ in examples]
    least = [row[0] for row in database.execute(LEAST_CERTAIN, {"n": n_least}).fetchall()]
    rows = database.execute(CHOSEN, {"chosen": [*by_category, *least]}).fetchall()
    found = {
        sha256: Picture(uri, tier1_id, tuple((one["id"], one["score"]) for one in labels[:LABELS_SHOWN]))
        for sha256, uri, tier1_id, labels in rows
    }
    return Gallery(tuple(found[one] for one in by_category), tuple(found[one] for one in least))


def fetch_pictures(gallery: Gallery, sources: Mapping[str, Source], limits: FetchLimits) -> Gallery:
    """The gallery with a thumbnail of every image that can be fetched and decoded.

    Args:
        sources: URI -> where its bytes are, for images that a file holds several of; others are at their URI.
    """
    uris = sorted({picture.uri for picture in (*gallery.by_category, *gallery.least_certain)})
    small = make_thumbnails(uris, sources, limits)

    def with_thumbnails(pictures: Sequence[Picture]) -> tuple[Picture, ...]:
        return tuple(replace(picture, thumbnail=small.get(picture.uri)) for picture in pictures)

    return Gallery(with_thumbnails(gallery.by_category), with_thumbnails(gallery.least_certain))


def make_thumbnails(
    uris: Sequence[str], sources: Mapping[str, Source], limits: FetchLimits
) -> dict[str, str]:
    """URI -> the middle of its image as a JPEG `data:` URI; decoded in a process that may crash."""
    found = {}
    spec = ImageSpec(height=SIDE_PX, width=SIDE_PX, fit="crop")
    wanted = [sources.get(uri, Source(uri)) for uri in uris]
    with Fetcher(limits) as fetcher, DecoderProcess(spec) as decoder:
        for batch in fetcher.fetch_batches(wanted):
            payloads = {uris[at]: fetched.payload for at, fetched in batch if fetched.payload is not None}
            outcomes, pixels_nhwc = decoder.prepare_batch(list(payloads.values()))
            for uri, outcome, pixels_hwc in zip(payloads, outcomes, pixels_nhwc, strict=True):
                if outcome.status is Status.OK:
                    found[uri] = jpeg_uri(pixels_hwc)
    return found


def find_sources(plan: Plan, uris: Collection[str]) -> dict[str, Source]:
    """URI -> where its bytes are, of images that share a file: tars, and Parquet with images."""
    if not plan.containers or not uris:
        return {}
    import pyarrow.dataset as ds  # brings pandas along, which other runs do not need

    state = open_storage(plan.state_uri)
    filesystem, root = state.filesystem_and_path()
    files = [f"{root.rstrip('/')}/{file.path}" for file in plan.files]
    rows = ds.dataset(files, filesystem=filesystem, format="parquet").to_table(
        columns=list(LOCATION.names), filter=ds.field("uri").isin(list(uris))
    )
    return {source.uri: source for source in sources_of(rows)}
