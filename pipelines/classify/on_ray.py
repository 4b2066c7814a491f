"""The classification dataflow: plan -> load -> infer -> write part, as one Ray Dataset.

Arrow batches all the way. `Loader` and `Classifier` are the two costly things that live in actors: a
connection pool with a decoder process, and an ONNX session. What a written part means for the run is
the driver's business (`ledger.py`); nothing here decides what counts.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, Dataset, ExecutionResources

from pipelines.bundle.bundle import open_bundle
from pipelines.bundle.predictor import Predictor, Row, black, loaded_row, loaded_table, open_predictor
from pipelines.fetch.fetch import Fetcher
from pipelines.fetch.source import Batch, sources_of
from pipelines.images.decoder import DecoderProcess
from pipelines.images.prepare import Pixels
from pipelines.inventory.plan import open_plan
from pipelines.ledger import parts
from pipelines.ledger.item_set import Range
from pipelines.messages import redact
from pipelines.specs import DecodeLimits, FetchLimits, ImageSpec, RuntimeSpec
from pipelines.storage.storage import open_storage

CALLS_PER_LOAD_ACTOR = 16
"""Chunks in hand per load actor: while some wait for a slow host's last image, the others are decoded.

What they may hold in memory is bounded by `FetchLimits`, not by this.
"""

BLOCKS_PER_CALL = 2
"""Blocks that Ray counts for each call in hand, finished or not."""

STEPS = 3
"""Ray shares a limit among the steps; the share of loading, the largest, must keep all its calls busy."""

INPUT_BLOCKS = 2_000
"""Most blocks that the work list is cut into: enough for any pool, few enough for the driver's memory."""


@dataclass(frozen=True)
class Source:
    """Where the work comes from and what one image may cost."""

    state_uri: str
    image_spec: ImageSpec
    decode: DecodeLimits
    fetch: FetchLimits


@dataclass(frozen=True)
class Model:
    """Which bundle runs, how, and what is kept of its answer."""

    bundle_uri: str
    manifest_sha256: str
    runtime: RuntimeSpec
    top_k: int


@dataclass(frozen=True)
class Pools:
    """Actors and their share of the cluster, resolved to numbers."""

    load_actors: int
    infer_actors: int
    cpus_per_load: float
    cpus_per_infer: float
    gpus_per_infer: float
    items_per_batch: int
    items_per_part: int


class BundleReplaced(RuntimeError):
    """Another model lies where the run's model was."""


def classify(
    chunks: pa.Table, source: Source, model: Model, target: parts.PartContext, pools: Pools
) -> Dataset:
    """The whole dataflow, in the order the rows move; consuming it yields one row per written part.

    Args:
        chunks: `work_list` of the plan rows to classify.
    """
    # not from_arrow, which has a task of its own look at every block before anything starts
    work = ray.data.from_blocks(blocks_of(chunks))
    block_bytes = pools.items_per_batch * source.image_spec.pixel_bytes
    # Of this dataset alone: the process's own context would carry them into the next job.
    work.context.target_max_block_size = max(block_bytes, 1 << 20)
    work.context.execution_options.resource_limits = ExecutionResources(
        object_store_memory=memory_ahead(block_bytes, pools)
    )
    return (
        work.map_batches(
            Loader,
            fn_constructor_args=(source,),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=pools.cpus_per_load,
            compute=ActorPoolStrategy(
                size=pools.load_actors,
                max_concurrent_calls_per_actor=CALLS_PER_LOAD_ACTOR,
                enable_true_multi_threading=True,
            ),
        )
        .map_batches(
            Classifier,
            fn_constructor_args=(model,),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=pools.cpus_per_infer,
            num_gpus=pools.gpus_per_infer or None,
            compute=ActorPoolStrategy(size=pools.infer_actors),
        )
        .map_batches(
            parts.write_batch,
            fn_args=(target,),
            batch_size=pools.items_per_part,
            batch_format="pyarrow",
            num_cpus=0.25,
        )
    )


def memory_ahead(block_bytes: int, pools: Pools) -> int:
    """Bytes of the object store that the run may use: what its actors hold, and as much again in between.

    Without a limit decoding runs ahead of the model until half the store is full, gigabytes on any machine.
    """
    calls = pools.load_actors * CALLS_PER_LOAD_ACTOR + pools.infer_actors
    return STEPS * BLOCKS_PER_CALL * calls * max(block_bytes, 1 << 20)


def work_list(missing: Sequence[Range], items_per_batch: int) -> pa.Table:
    """Ranges of plan rows still to do, grouped into chunks of at most `items_per_batch` rows.

    Scattered rows (a later pass over failures) share a chunk, so that a thousand single rows are not a
    thousand requests for work.
    """
    firsts, stops = np.array(missing, np.int64).reshape(-1, 2).T
    done_before = np.cumsum(stops - firsts) - (stops - firsts)
    total = int((stops - firsts).sum())
    # Work is laid end to end and cut where a range begins and where a chunk is full.
    cuts = np.union1d(done_before, np.arange(0, total, items_per_batch))
    owner = np.searchsorted(done_before, cuts, side="right") - 1
    starts = firsts[owner] + cuts - done_before[owner]
    lengths = np.diff(cuts, append=total)
    spans = pa.StructArray.from_arrays([pa.array(starts), pa.array(starts + lengths)], ["start", "stop"])
    offsets = np.searchsorted(cuts, np.arange(0, total + items_per_batch, items_per_batch))
    return pa.table({"ranges": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), spans)})


def blocks_of(chunks: pa.Table) -> list[pa.Table]:
    rows = max(1, -(-chunks.num_rows // INPUT_BLOCKS))
    return [chunks.slice(start, rows) for start in range(0, chunks.num_rows, rows)]


class Loader:
    """Owns a connection pool and a decoder process; turns chunks of the plan into pixels."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._plan = open_plan(open_storage(source.state_uri))
        self._fetcher = Fetcher(source.fetch)
        self._decoder = DecoderProcess(source.image_spec, source.decode)
        self._decoding = threading.Lock()

    def __call__(self, chunks: pa.Table) -> Iterator[pa.Table]:
        """For each chunk its rows of `schema.LOADED` with pixels, in plan order."""
        for ranges in chunks["ranges"].to_pylist():
            items = self._plan.items([(span["start"], span["stop"]) for span in ranges])
            yield self._load(items)

    def _load(self, items: pa.Table) -> pa.Table:
        item_ids = items["item_id"].to_pylist()
        pixels_nhwc = black(len(item_ids), self._source.image_spec)
        # In plan order again: a part then holds a few long ranges, however many actors there are.
        rows: list[Row] = [{}] * len(item_ids)
        for batch in self._fetcher.fetch_batches(sources_of(items)):
            self._decode(batch, item_ids, rows, pixels_nhwc)
        return loaded_table(rows, pixels_nhwc)

    def _decode(self, batch: Batch, item_ids: list[int], rows: list[Row], pixels_nhwc: Pixels) -> None:
        """Put the batch's rows and pixels into their places."""
        payloads = {index: fetched.payload for index, fetched in batch if fetched.payload is not None}
        with self._decoding:
            prepared, pixels_nhwc[list(payloads)] = self._decoder.prepare_batch(list(payloads.values()))
        images = dict(zip(payloads, prepared, strict=True))
        for index, fetched in batch:
            rows[index] = loaded_row(item_ids[index], fetched, images.get(index))


class Classifier:
    """Owns one ONNX session; turns pixels into label columns."""

    def __init__(self, model: Model) -> None:
        bundle = open_bundle(model.bundle_uri, verify=False)  # the model's own bytes are verified when read
        if bundle.manifest_sha256 != model.manifest_sha256:
            raise BundleReplaced(
                f"{redact(model.bundle_uri)} is no longer the bundle that this run began with; put that one "
                "back, or classify into another output folder"
            )
        self._predictor: Predictor = open_predictor(bundle, model.runtime, model.top_k)

    def __call__(self, loaded: pa.Table) -> pa.Table:
        """Rows of `schema.SCORED`, in the order they came."""
        return self._predictor.score(loaded)
