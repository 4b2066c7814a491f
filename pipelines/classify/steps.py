"""The steps of classification, each from Arrow batch to Arrow batch: load, infer, write part.

`Loader` and `Classifier` own what is costly: connections with a decoder process, and an ONNX session. Both
engines run these very steps; neither knows what they do, and nothing here knows an engine.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines import metrics
from pipelines.bundle.bundle import open_bundle
from pipelines.bundle.predictor import open_predictor
from pipelines.bundle.settings import RuntimeSpec
from pipelines.classify.known import Known
from pipelines.fetch.fetch import Fetcher
from pipelines.fetch.load import BatchLoader, Item, load
from pipelines.fetch.settings import FetchLimits
from pipelines.fetch.source import ContainerVersion, sources_of
from pipelines.images.decoder import DecoderProcess
from pipelines.images.prepare import Pixels, Prepared
from pipelines.inventory.plan import open_plan
from pipelines.ledger.item_set import Range, Ranges
from pipelines.messages import JobFailed, redact
from pipelines.specs import DecodeLimits, ImageSpec
from pipelines.storage.places import Places
from pipelines.storage.storage import open_storage


@dataclass(frozen=True)
class Source:
    """Where the work comes from and what one image may cost."""

    state_uri: str
    image_spec: ImageSpec
    decode: DecodeLimits
    fetch: FetchLimits
    load_actors: int = 1
    """How many share the limits per host."""


@dataclass(frozen=True)
class Model:
    """Which bundle runs, how, and how many labels are kept."""

    bundle_uri: str
    manifest_sha256: str
    runtime: RuntimeSpec
    top_k: int


@dataclass(frozen=True)
class Pools:
    """How many of each step run at once, their share of the cluster, and the size of a batch between them."""

    load_actors: int
    infer_actors: int
    cpus_per_load: float
    cpus_per_infer: float
    gpus_per_infer: float
    items_per_batch: int
    items_per_part: int
    start_s: float
    """How long they may take to start, seconds."""


WorkBatch = Sequence[Mapping[str, int]]
"""The ranges of items in a row of the work list."""


class BundleReplaced(JobFailed):
    """The bundle is no longer the one that the run began with."""


def work_list(missing: Sequence[Range], items_per_batch: int) -> pa.Table:
    """Item ranges still to do, grouped into batches of at most `items_per_batch` items, a row each.

    Scattered items (a later pass over failures) share a batch, so that a thousand single items are not a
    thousand requests for work.
    """
    firsts, stops = Ranges(missing).bounds.T
    done_before = np.cumsum(stops - firsts) - (stops - firsts)
    total = int((stops - firsts).sum())
    # The ranges are laid end to end and cut where a range begins and where a batch is full.
    cuts = np.union1d(done_before, np.arange(0, total, items_per_batch))
    owner = np.searchsorted(done_before, cuts, side="right") - 1
    starts = firsts[owner] + cuts - done_before[owner]
    lengths = np.diff(cuts, append=total)
    spans = pa.StructArray.from_arrays([pa.array(starts), pa.array(starts + lengths)], ["start", "stop"])
    offsets = np.searchsorted(cuts, np.arange(0, total + items_per_batch, items_per_batch))
    return pa.table({"ranges": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), spans)})


class Loader:
    """Owns connections and a decoder process; turns batches of the work list into pixels.

    Safe to call from several threads: they wait for the network together and decode one after the other.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._plan = open_plan(open_storage(source.state_uri))
        self._known = Known(open_storage(source.state_uri))
        self._containers = {
            file.uri: ContainerVersion(file.size_bytes, file.version) for file in self._plan.containers
        }
        places = Places.of(self._plan.origin.base, source.fetch.allow)
        self._fetcher = Fetcher(source.fetch, load_actors=source.load_actors, places=places)
        self._decoder = DecoderProcess(source.image_spec, source.decode)
        self._decoding = threading.Lock()
        self._closed = False
        for counter in ("bytes_fetched", "retries", "hosts_given_up"):
            metrics.count(counter, 0)

    def __call__(self, batches: pa.Table) -> Iterator[pa.Table]:
        """For each batch its rows of `schema.LOADED` with pixels, in plan order.

        In plan order, a part holds a few long ranges of items, however many loaders there are. Ray repeats a
        task whose actor is lost, and skips as many of its tables as it has: they must be the same again.
        """
        for ranges in batches["ranges"].to_pylist():
            item_ids, sources = zip(*self._items(ranges), strict=True)
            with metrics.timed("load"):
                loaded = load(
                    self._fetcher,
                    sources,
                    item_ids=item_ids,
                    spec=self._source.image_spec,
                    decode=self._decode,
                    knows=self._known.knows,
                )
            yield loaded

    def load_ahead(self, batches: Iterable[WorkBatch], rows_per_table: int) -> Iterator[pa.Table]:
        """The same of batches of at most so many items, but late images come in tables of their own."""
        ahead = BatchLoader(
            self._fetcher,
            rows_per_table=rows_per_table,
            spec=self._source.image_spec,
            decode=self._decode,
            knows=self._known.knows,
        )
        return ahead.load(map(self._items, batches))

    def _items(self, ranges: WorkBatch) -> list[Item]:
        items = self._plan.items([(span["start"], span["stop"]) for span in ranges])
        item_ids = items["item_id"].to_pylist()
        sources = self._known.put_earlier(sources_of(items, self._containers), item_ids)
        return list(zip(item_ids, sources, strict=True))

    def close(self) -> None:
        """End the connections and the decoder process."""
        self._fetcher.close()
        with self._decoding:
            self._closed = True
            self._decoder.close()

    def _decode(
        self, payloads: Sequence[bytes], pixels_nhwc: Pixels, positions: Sequence[int]
    ) -> Sequence[Prepared]:
        with self._decoding:  # the decoder's own array is overwritten by its next call
            if self._closed:
                raise RuntimeError("the loader is closed")
            prepared, pixels_nhwc[list(positions)] = self._decoder.prepare_batch(payloads)
        return prepared


class Classifier:
    """Owns one ONNX session; turns pixels into label columns."""

    def __init__(self, model: Model) -> None:
        bundle = open_bundle(model.bundle_uri, verify=False)  # the model's own bytes are verified when read
        if bundle.manifest_sha256 != model.manifest_sha256:
            raise BundleReplaced(
                f"{redact(model.bundle_uri)} is no longer the bundle that this run began with; put that one "
                "back, or classify into another output folder"
            )
        self._predictor = open_predictor(bundle, model.runtime, model.top_k)

    def __call__(self, loaded: pa.Table) -> pa.Table:
        """Rows of `schema.SCORED`, in the order of `loaded`."""
        with metrics.timed("infer"):
            return self._predictor.score(loaded)
