"""Labelled rows become decoded splits on the cluster, with an account of every image that was left out.

Broken images are listed and skipped, too many of them stop the run; images whose very bytes are in two
splits stay in the one that measures.
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.datasets import pixels, splits
from pipelines.datasets.dataset import LabelledData
from pipelines.datasets.settings import ImageCache
from pipelines.messages import JobFailed
from pipelines.specs import ImageSpec
from pipelines.training.recipe import ClassBalance

log = logging.getLogger(__name__)

Rows = npt.NDArray[np.int64]
KEPT_IN = {
    "memory": "the object store",
    "disk": "the object store and on disk",
    "stream": "no place: streamed",
}
LISTED = 20
"""Broken images named in the log; run.json has them all."""


@dataclass(frozen=True)
class DecodedData:
    """A dataset, decoded: what workers train and are measured on."""

    data: LabelledData
    spec: ImageSpec
    """Pixels of validation and test images: the model's own."""
    stored_spec: ImageSpec
    """Pixels of training images, a little larger."""
    decoded: dict[str, Any]
    """Split -> Ray Dataset in the schema of `schema_of`."""
    rows: dict[str, Rows]
    """Split -> row ids that can be used."""
    mode: str
    how: ImageCache
    unreadable: list[dict[str, str]]
    duplicates: dict[str, int]
    """Images removed because another split has their very bytes, by the split they left."""

    @property
    def streams(self) -> bool:
        """Whether images come as a stream of shards and not by row."""
        return self.mode != "memory"

    def class_counts(self) -> Rows:
        """Usable training images of each class."""
        return self.data.class_counts(self.rows[splits.TRAIN])

    def strata(self) -> Rows:
        """The class that sampling goes by: the label, or the rarest of several; none is one of its own."""
        chosen = self.data.targets()[self.rows[splits.TRAIN]]
        if chosen.ndim == 1:
            return np.asarray(chosen, np.int64)
        rarity = np.where(chosen > 0, self.class_counts()[None, :], np.iinfo(np.int64).max)
        strata: Rows = np.where(chosen.any(axis=1), rarity.argmin(axis=1), chosen.shape[1])
        return strata

    def account(self) -> dict[str, Any]:
        """Where every image of the dataset went."""
        return {
            "images": {name: len(rows) for name, rows in self.rows.items()},
            "unreadable": self.unreadable,
            "duplicates_removed": self.duplicates,
            "dropped": self.data.dropped,
            "class_counts": dict(zip(self.data.classes, self.class_counts().tolist(), strict=True)),
        }


def prepare(data: LabelledData, spec: ImageSpec, how: ImageCache, *, seed: int) -> DecodedData:
    """Decode every split on the running cluster.

    Raises:
        JobFailed: too many images are unreadable, or a split has none left.
    """
    stored = pixels.enlarge(spec, how.margin)
    mode = _chosen_mode(data, spec, stored, how)
    decoded = {}
    for name in (splits.TRAIN, splits.VALIDATION, splits.TEST):
        order = data.indices(name)
        if name == splits.TRAIN and mode != "memory":
            # A pass reorders blocks and shuffles within a window, so blocks are random samples.
            order = np.random.default_rng(seed).permutation(order)
        dataset = pixels.decode_dataset(data.take(order), stored if name == splits.TRAIN else spec, how)
        decoded[name] = dataset if mode == "stream" else dataset.materialize()
    outcome = pa.concat_tables([pixels.list_outcomes(dataset) for dataset in decoded.values()]).sort_by(
        "item_id"
    )
    unreadable = pixels.list_unreadable(
        outcome, data.rows["uri"].to_pylist(), max_fraction=how.max_unreadable_fraction
    )
    for image in unreadable[:LISTED]:
        log.warning("left out %s: %s %s", image["uri"], image["status"], image["error"])
    readable = pa.compute.equal(outcome["status"], "ok").to_numpy()
    # An unreadable copy is counted once, as unreadable.
    repeated = splits.find_leaking_copies(outcome["sha256"].to_pylist(), data.splits) & readable
    usable = readable & ~repeated
    rows = {name: data.indices(name)[usable[data.indices(name)]] for name in decoded}
    _refuse_empty(rows)
    left = {name: int(repeated[data.indices(name)].sum()) for name in decoded}
    duplicates = {name: count for name, count in left.items() if count}
    if duplicates:
        log.warning("removed images that are in another split too: %s", duplicates)
    return DecodedData(data, spec, stored, decoded, rows, mode, how, unreadable, duplicates)


def _chosen_mode(data: LabelledData, spec: ImageSpec, stored: ImageSpec, how: ImageCache) -> str:
    """How decoded images will be kept; said in the log."""
    n_train = len(data.indices(splits.TRAIN))
    n_measured = data.rows.num_rows - n_train
    n_bytes = 3 * (n_train * stored.height * stored.width + n_measured * spec.height * spec.width)
    mode = pixels.choose_mode(how, n_bytes, pixels.measure_room(how))
    size = f"{n_bytes / 1e6:,.0f} MB at {stored.width}x{stored.height}"
    log.info("%d images decode to %s, kept in %s", data.rows.num_rows, size, KEPT_IN[mode])
    return mode


def _refuse_empty(rows: dict[str, Rows]) -> None:
    for name in (splits.TRAIN, splits.VALIDATION):
        if not len(rows[name]):
            raise JobFailed(f"the {name} split has no usable image; give more images or other shares")


def training_shards(corpus: DecodedData, balance: ClassBalance, *, seed: int) -> Any:
    """The training dataset as workers get it: all of it, or a stream with each class as often as asked.

    Each pass over a stream has its blocks in another order.
    """
    trains = corpus.decoded[splits.TRAIN]
    if not corpus.streams:
        return trains
    if corpus.mode == "disk":
        trains = pixels.reorder_blocks(trains, seed)
    else:
        order = np.random.default_rng(seed).permutation(corpus.rows[splits.TRAIN])
        images = corpus.data.take(order)
        trains = pixels.decode_dataset(images, corpus.stored_spec, corpus.how, reorder_seed=seed)
    times = np.zeros(corpus.data.rows.num_rows, np.int64)
    drawn = one_pass(corpus.strata(), balance, np.random.default_rng(seed))
    np.add.at(times, corpus.rows[splits.TRAIN][drawn], 1)
    return trains.map_batches(
        pixels.repeat_rows, batch_size=None, batch_format="pyarrow", fn_kwargs={"times": times}
    )


def validation_shards(corpus: DecodedData, workers: int) -> list[Any]:
    """The validation dataset as each worker gets it: all of it, or a part to stream."""
    dataset, rows = corpus.decoded[splits.VALIDATION], corpus.rows[splits.VALIDATION]
    if corpus.mode == "memory":
        return [dataset] * workers
    if corpus.mode == "disk":
        parts: list[Any] = dataset.split(workers)
        return parts
    return [
        pixels.decode_dataset(corpus.data.take(rows[rank::workers]), corpus.spec, corpus.how)
        for rank in range(workers)
    ]


def epoch_order(strata: Rows, balance: ClassBalance, *, views: int, seed: int, epoch: int) -> Rows:
    """Indices into `strata` for one epoch: every view is a shuffled pass of its own."""
    return np.concatenate(
        [one_pass(strata, balance, np.random.default_rng([seed, epoch, view])) for view in range(views)]
    )


def one_pass(strata: Rows, balance: ClassBalance, random: np.random.Generator) -> Rows:
    """A shuffled pass over the images, each class as often as the sampling says."""
    if balance.sampling == "none":
        return random.permutation(len(strata))
    per_class = _target_per_class(strata, balance)
    drawn = [_drawn_from(np.flatnonzero(strata == one), per_class, random) for one in np.unique(strata)]
    return random.permutation(np.concatenate(drawn))


def _target_per_class(strata: Rows, balance: ClassBalance) -> int:
    counts = np.unique(strata, return_counts=True)[1]
    return {
        "oversample": int(counts.max()),
        "undersample": int(counts.min()),
        "target": balance.target_per_class,
    }[balance.sampling]


def _drawn_from(members: Rows, wanted: int, random: np.random.Generator) -> Rows:
    """`wanted` of the members: whole rounds of all of them, then a random part of one."""
    rounds, rest = divmod(wanted, len(members))
    return np.concatenate([np.tile(members, rounds), random.permutation(members)[:rest]])


def images_per_pass(strata: Rows, balance: ClassBalance) -> int:
    if balance.sampling == "none":
        return len(strata)
    return _target_per_class(strata, balance) * len(np.unique(strata))
