"""The classification dataflow: plan -> load -> infer -> write part, as one Ray Dataset.

Arrow batches all the way. `Loader` and `Classifier` are the two costly things that live in actors: a
connection pool with a decoder process, and an ONNX session. What a written part means for the run is
the driver's business (`ledger.py`); nothing here decides what counts.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, Dataset

from pipelines import output
from pipelines.bundle import open_bundle
from pipelines.decoder import DecoderProcess
from pipelines.fetch import Fetched, Fetcher
from pipelines.plan import open_plan
from pipelines.prediction import Predictor, loaded_table, open_predictor
from pipelines.rowset import Range
from pipelines.specs import DecodeLimits, FetchLimits, ImageSpec, RuntimeSpec
from pipelines.storage import open_storage

CALLS_PER_LOAD_ACTOR = 2
"""Chunks in hand per load actor: the second is fetched while the first is decoded."""

INPUT_BLOCKS = 2_000
"""Most blocks that the work list is cut into: enough for any pool, few enough for the driver's memory."""


@dataclass(frozen=True)
class Source:
    """Where the work comes from and what one image may cost."""

    state_uri: str
    image_spec: ImageSpec
    decode: DecodeLimits
    fetch: FetchLimits
    rows_per_block: int


@dataclass(frozen=True)
class Model:
    """Which bundle runs, how, and what is kept of its answer."""

    bundle_uri: str
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
    rows_per_part: int


def classify(chunks: pa.Table, source: Source, model: Model, target: output.Target, pools: Pools) -> Dataset:
    """The whole dataflow, in the order the rows move; consuming it yields one row per written part.

    Args:
        chunks: `work_list` of the plan rows to classify.
    """
    block_bytes = source.rows_per_block * source.image_spec.height * source.image_spec.width * 3
    ray.data.DataContext.get_current().target_max_block_size = max(block_bytes, 1 << 20)
    return (
        ray.data.from_arrow(blocks_of(chunks))
        .map_batches(
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
            output.write_batch,
            fn_args=(target,),
            batch_size=pools.rows_per_part,
            batch_format="pyarrow",
            num_cpus=0.25,
        )
    )


def work_list(missing: Sequence[Range], rows_per_chunk: int) -> pa.Table:
    """Ranges of plan rows still to do, grouped into chunks of at most `rows_per_chunk` rows.

    Scattered rows (a later pass over failures) share a chunk, so that a thousand single rows are not a
    thousand requests for work.
    """
    chunks: list[list[dict[str, int]]] = []
    room = 0
    for first, stop in missing:
        start = first
        while start < stop:
            if room == 0:
                chunks.append([])
                room = rows_per_chunk
            taken = min(room, stop - start)
            chunks[-1].append({"start": start, "stop": start + taken})
            start, room = start + taken, room - taken
    span = pa.struct([pa.field("start", pa.int64()), pa.field("stop", pa.int64())])
    return pa.table({"ranges": pa.array(chunks, pa.list_(span))})


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
        """Rows of `schema.LOADED` with pixels, in the order their bytes arrive."""
        for ranges in chunks["ranges"].to_pylist():
            items = self._plan.rows([(span["start"], span["stop"]) for span in ranges])
            yield from self._load(items)

    def _load(self, items: pa.Table) -> Iterator[pa.Table]:
        row_ids = items["row_id"].to_numpy()
        waiting: list[tuple[int, Fetched]] = []
        for index, fetched in self._fetcher.fetch_items(items):
            waiting.append((int(row_ids[index]), fetched))
            if len(waiting) == self._source.rows_per_block:
                yield self._decode(waiting)
                waiting = []
        if waiting:
            yield self._decode(waiting)

    def _decode(self, arrived: Sequence[tuple[int, Fetched]]) -> pa.Table:
        payloads = [fetched.payload for _, fetched in arrived if fetched.payload is not None]
        with self._decoding:
            prepared, pixels_nhwc = self._decoder.prepare_batch(payloads)
            return loaded_table(arrived, prepared, pixels_nhwc, self._source.image_spec)


class Classifier:
    """Owns one ONNX session; turns pixels into label columns."""

    def __init__(self, model: Model) -> None:
        self._predictor: Predictor = open_predictor(
            open_bundle(model.bundle_uri, verify=False), model.runtime, model.top_k
        )

    def __call__(self, loaded: pa.Table) -> pa.Table:
        """Rows of `schema.SCORED`, in the order they came."""
        return self._predictor.score(loaded)
