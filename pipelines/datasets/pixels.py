"""Turn labelled rows into decoded pixels on the cluster, and serve them to training workers.

Ray Data fetches and decodes; `images.prepare` makes every pixel. Three ways of keeping the result: `memory`
(decoded once, any image at any time, shared between the workers of a node through the object store),
`disk` (decoded once, spilled, read in shuffled order) and `stream` (decoded again for every pass over them).
"""

import functools
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.datasets.settings import ImageCache
from pipelines.fetch.fetch import Fetcher
from pipelines.fetch.load import decode_here, load
from pipelines.fetch.settings import FetchLimits
from pipelines.fetch.source import sources_of
from pipelines.images.pixels import pixels_of
from pipelines.images.prepare import Pixels
from pipelines.messages import JobFailed
from pipelines.specs import DecodeLimits, ImageSpec
from pipelines.status import Status

Rows = npt.NDArray[np.int64]

SHUFFLE_ROWS = 4096
"""Rows that are shuffled together when images arrive as a stream of blocks in random order."""

CLASSES = pa.field("classes", pa.list_(pa.int32()))
"""What decoded rows have besides `schema.LOADED` and their pixels."""


def enlarge(spec: ImageSpec, margin: float) -> ImageSpec:
    """The spec of stored training images, so that a crop does not have to be blown up."""
    return replace(spec, height=math.ceil(spec.height * margin), width=math.ceil(spec.width * margin))


def decode_dataset(
    images: pa.Table, spec: ImageSpec, cache: ImageCache, *, reorder_seed: int | None = None
) -> Any:
    """A lazy Ray Dataset of these rows of a labelled dataset: `decode_batch` of them.

    They come in this order, or with a `reorder_seed` in blocks of it whose order changes with every pass.
    """
    import ray

    step = cache.images_per_task
    chunks = [images.slice(start, step) for start in range(0, max(images.num_rows, 1), step)]
    listed = ray.data.from_arrow(chunks)
    if reorder_seed is not None:
        listed = reorder_blocks(listed, reorder_seed)
    return listed.map_batches(decode_batch, batch_size=None, batch_format="pyarrow", fn_kwargs={"spec": spec})


def reorder_blocks(dataset: Any, seed: int) -> Any:
    """The dataset with its blocks in another random order in each pass, the same ones for the same seed.

    The order is drawn when all blocks are known, so this belongs before what fetches or decodes.
    """
    from ray.data import RandomSeedConfig

    return dataset.randomize_block_order(seed=RandomSeedConfig(seed, reseed_after_execution=True))


def decode_batch(batch: pa.Table, spec: ImageSpec, limits: DecodeLimits | None = None) -> pa.Table:
    """Fetch and decode; an image that cannot be used keeps its row and its reason."""
    loaded = load(
        fetcher(),
        sources_of(batch),
        item_ids=batch["item_id"].to_pylist(),
        spec=spec,
        decode=decode_here(spec, limits),
    )
    return loaded.add_column(loaded.num_columns - 1, CLASSES, batch["classes"])


@functools.cache
def fetcher() -> Fetcher:
    """This process's connections: Ray gives a worker process many batches.

    Private addresses are allowed: whoever trains has chosen the dataset, unlike the pages of an inventory.
    """
    return Fetcher(FetchLimits(allow_private_addresses=True))


def list_outcomes(dataset: Any) -> pa.Table:
    """Status, error and sha256 of every row of a decoded dataset, without its pixels."""
    import ray

    kept = dataset.select_columns(["item_id", "status", "error", "sha256"])
    return pa.concat_tables(ray.get(kept.to_arrow_refs()))


def list_unreadable(outcome: pa.Table, uris: Sequence[str], *, max_fraction: float) -> list[dict[str, str]]:
    """The images that could not be used, with their reasons.

    Raises:
        JobFailed: they are more than `max_fraction` of all.
    """
    bad = outcome.filter(pa.compute.not_equal(outcome["status"], Status.OK)).sort_by("item_id").to_pylist()
    listed = [
        {"uri": uris[row["item_id"]], "status": row["status"], "error": row["error"] or ""} for row in bad
    ]
    examples = "; ".join(f"{row['uri']}: {row['status']}" for row in listed[:3])
    refuse_too_many(len(bad), outcome.num_rows, max_fraction=max_fraction, examples=examples)
    return listed


def refuse_too_many(n_unreadable: int, n_images: int, *, max_fraction: float, examples: str) -> None:
    """Raise JobFailed when more than `max_fraction` of the images cannot be used."""
    if n_unreadable > max_fraction * n_images:
        raise JobFailed(
            f"{n_unreadable} of {n_images} images cannot be used ({examples}); the limit is "
            f"{max_fraction:.0%}. Fix the dataset, or raise --cache.max-unreadable-fraction"
        )


@dataclass(frozen=True)
class Room:
    """What decoded images may take, bytes."""

    memory: int
    disk: int


def measure_room(cache: ImageCache) -> Room:
    """What this cluster can keep: the smallest node's object store, and the free disk behind it."""
    import ray

    stores = [node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"]]
    free = shutil.disk_usage(tempfile.gettempdir()).free
    return Room(int(min(stores) * cache.memory_fraction), int(free * cache.disk_fraction))


def choose_mode(cache: ImageCache, n_bytes: int, room: Room) -> str:
    """How to keep decoded images of this size: the way asked for, or the fastest that fits."""
    if cache.mode != "auto":
        return cache.mode
    if n_bytes <= room.memory:
        return "memory"
    return "disk" if n_bytes <= room.disk else "stream"


def repeat_rows(batch: pa.Table, times: npt.NDArray[np.int64]) -> pa.Table:
    """Each row as often as `times[item_id]` says: 0 drops it, 2 draws it twice."""
    return batch.take(pa.array(np.repeat(np.arange(batch.num_rows), times[batch["item_id"].to_numpy()])))


def class_matrix(classes: pa.Array | pa.ChunkedArray, n_classes: int) -> npt.NDArray[np.uint8]:
    """Lists of class indices as a 0/1 matrix [n, classes]."""
    if isinstance(classes, pa.ChunkedArray):
        classes = classes.combine_chunks()
    targets_nc = np.zeros((len(classes), n_classes), np.uint8)
    targets_nc[pa.compute.list_parent_indices(classes).to_numpy(), classes.flatten().to_numpy()] = 1
    return targets_nc


def dense_targets(classes: pa.ChunkedArray, n_classes: int) -> npt.NDArray[np.float32]:
    """Class lists as the loss takes them: float32 [n, classes]."""
    return class_matrix(classes, n_classes).astype(np.float32)


class PixelStore:
    """Every decoded image of a dataset, mapped from the node's object store and not copied."""

    def __init__(self, iterator: Any, spec: ImageSpec, n_classes: int) -> None:
        blocks = [
            block
            for block in iterator.iter_batches(batch_size=None, batch_format="pyarrow")
            if block.num_rows
        ]
        self.pixels = [pixels_of(block["pixels"], spec) for block in blocks]
        self.targets_nc = np.concatenate([dense_targets(block["classes"], n_classes) for block in blocks])
        self.item_ids = np.concatenate([block["item_id"].to_numpy() for block in blocks])
        self.first = np.cumsum([0, *(len(pixels) for pixels in self.pixels)])
        self.place = np.argsort(self.item_ids)

    def __len__(self) -> int:
        return len(self.item_ids)

    def take(self, item_ids: Rows) -> tuple[Pixels, npt.NDArray[np.float32]]:
        """Pixels [n, height, width, 3] and targets [n, classes] of these rows."""
        places = self.place[np.searchsorted(self.item_ids, item_ids, sorter=self.place)]
        blocks = np.searchsorted(self.first, places, side="right") - 1
        pixels = [
            self.pixels[block][place - self.first[block]] for block, place in zip(blocks, places, strict=True)
        ]
        return np.stack(pixels), self.targets_nc[places]


@dataclass
class Tally:
    """Images that streams gave in one epoch."""

    images: int = 0
    unreadable: int = 0
    """Of these, how many could not be read, though the first pass could."""

    def readable(self, batch: pa.Table) -> Rows:
        """Places of a batch's images that can be used; all of them are counted."""
        places = np.flatnonzero(pa.compute.equal(batch["status"], Status.OK))
        self.images += batch.num_rows
        self.unreadable += batch.num_rows - len(places)
        return places


def stream_batches(
    iterator: Any, spec: ImageSpec, n_classes: int, *, batch_size: int, seed: int, tally: Tally
) -> Iterator[tuple[Pixels, npt.NDArray[np.float32]]]:
    """One pass over this worker's shard in whole batches, shuffled within a window.

    Equal shards give equally many batches, or workers would wait for each other and never end: others of its
    batch, or of the batch before, replace an image that cannot be read. A shard that does not fill
    one batch is repeated within it; else the remainder is left out.

    Raises:
        JobFailed: the shard has no image that can be read.
    """
    last, owed = None, 0
    for batch in iterator.iter_batches(
        batch_size=batch_size,
        batch_format="pyarrow",
        local_shuffle_buffer_size=max(SHUFFLE_ROWS, 4 * batch_size),
        local_shuffle_seed=seed,
    ):
        if last is not None and batch.num_rows < batch_size:
            break
        places, owed = tally.readable(batch), owed + 1
        if len(places):
            last = batch.take(pa.array(np.resize(places, batch_size)))
        for _ in range(owed if last is not None else 0):
            yield to_arrays(last, spec, n_classes)
            owed -= 1
    if last is None:
        raise JobFailed(
            f"none of the {tally.images} images of this worker's part can be read; see whether their source "
            "answers, or lower --num-workers"
        )


def evaluation_batches(
    iterator: Any, spec: ImageSpec, n_classes: int, *, batch_size: int, rows: Rows, tally: Tally
) -> Iterator[tuple[Pixels, npt.NDArray[np.float32]]]:
    """One pass in order over the images of a shard that are among these (rising) row ids and can be read."""
    for batch in iterator.iter_batches(batch_size=batch_size, batch_format="pyarrow"):
        ids = batch["item_id"].to_numpy()
        wanted = batch.filter(rows[np.searchsorted(rows, ids).clip(max=len(rows) - 1)] == ids)
        found = wanted.take(pa.array(tally.readable(wanted)))
        if found.num_rows:
            yield to_arrays(found, spec, n_classes)


def to_arrays(batch: pa.Table, spec: ImageSpec, n_classes: int) -> tuple[Pixels, npt.NDArray[np.float32]]:
    """Pixels [n, height, width, 3] that torch may own, and targets [n, classes]."""
    return pixels_of(batch["pixels"], spec).copy(), dense_targets(batch["classes"], n_classes)
