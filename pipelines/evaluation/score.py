"""Turn any model and a labelled split into `Scored`, in one process: decoding threads around one model.

The labels of the dataset meet the classes of the model here: a label below a class counts as that class,
and one that no class covers is left out and counted.
"""

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.datasets import pixels, splits
from pipelines.datasets.dataset import LabelledData
from pipelines.evaluation.evaluation import Scored
from pipelines.evaluation.metrics import Array
from pipelines.specs import DecodeLimits, ImageSpec
from pipelines.status import Status
from pipelines.taxonomy.taxonomy import Taxonomy

ROWS_PER_CHUNK = 64
"""Images that a thread decodes at once, and that the model then takes."""
CHUNKS_AHEAD = 2
"""Decoded chunks in hand per thread: 64 images of 224 pixels are 10 MB."""

Run = Callable[[Array], tuple[Array, Array]]
"""uint8 pixels [n, height, width, 3] -> logits and probabilities, float32 [n, classes]."""


class NothingToExamine(ValueError):
    """No image of the dataset can be judged: the message says which split or label is at fault."""


@dataclass(frozen=True)
class Questions:
    """The images to be asked about and the right answers."""

    images: pa.Table
    """Rows of `LabelledData.rows`, with their `item_id`."""
    targets: Array
    """Class indices `[N]` of the model, or a 0/1 matrix for a multi-label one."""
    uncovered: Mapping[str, int]
    """Labels that no class of the model covers, and the images that have them."""


@dataclass(frozen=True)
class Seen:
    """What is known of the model having learned from the images that it is asked about."""

    words: str
    suspect: bool
    """Whether the numbers may flatter the model."""


@dataclass(frozen=True)
class Answers:
    """What came of the questions."""

    scored: Scored
    images: pa.Table
    """The rows of `scored`, in its order."""
    broken: list[dict[str, str]]
    """Images that could not be decoded: uri, status, error."""


def questions(
    data: LabelledData, split: str, class_ids: Sequence[str], taxonomy: Taxonomy, *, multi_label: bool
) -> Questions:
    """The split's images with their labels as classes of the model; `split` may be `all`.

    Raises:
        NothingToExamine: the split is empty, no label fits, or images have several labels for a model of one.
    """
    if data.multi_label and not multi_label:
        raise NothingToExamine(f"{data.settings.uri} has several labels per image; the model gives one")
    rows = np.arange(data.rows.num_rows) if split == "all" else data.indices(split)
    if not len(rows):
        counts = ", ".join(f"{n} {name}" for name, n in sorted(Counter(data.splits.tolist()).items()))
        raise NothingToExamine(
            f"{data.settings.uri} has no image in split {split!r} ({counts}); use --split all"
        )
    images = data.rows.take(pa.array(rows)).append_column("item_id", pa.array(rows, pa.int64()))
    covering = np.array([covering_class(one, class_ids, taxonomy) for one in data.classes], np.int64)
    labels = [covering[indices] for indices in images["classes"].to_pylist()]
    missed = Counter(
        data.classes[i] for indices in images["classes"].to_pylist() for i in indices if covering[i] < 0
    )
    kept = np.array([multi_label or bool((found >= 0).all()) for found in labels])
    if not kept.any():
        listed = ", ".join(list(missed)[:5])
        raise NothingToExamine(f"no class of the model covers the labels of {data.settings.uri}: {listed}")
    targets_nc = np.zeros((len(labels), len(class_ids)), np.uint8)
    for row, found in enumerate(labels):
        targets_nc[row, found[found >= 0]] = 1
    targets = targets_nc[kept] if multi_label else targets_nc[kept].argmax(axis=1)
    return Questions(images.filter(pa.array(kept)), targets, missed)


def seen_in_training(data: LabelledData, split: str, known: Mapping[str, str] | None) -> Seen:
    """What is known of the model having learned from a split's images.

    `known` are the splits that the model's run recorded (`runs.recorded_splits`), if they were found.
    """
    decided_here = split in data.divided_here
    if known is None and decided_here:
        return Seen(f"unknown: which images are {split} was decided here, not by the model's run", True)
    if known is None:
        own = "it was given none of these images" if split == "all" else "it kept to the dataset's own splits"
        return Seen(f"none, if {own}", False)
    uris = np.array(data.recorded_uris(), dtype=object)
    asked = uris if split == "all" else uris[data.indices(split)]
    learned = sum(known.get(uri) == splits.TRAIN for uri in asked)
    strange = sum(uri not in known for uri in asked)
    elsewhere = f"; {strange} are at addresses that its run does not know" if strange else ""
    flattering = learned > 0 and split != splits.TRAIN
    unsure = strange > 0 and decided_here
    return Seen(f"{learned} of {len(asked)} images{elsewhere}", flattering or unsure)


def covering_class(node_id: str, class_ids: Sequence[str], taxonomy: Taxonomy) -> int:
    """Index of the class that is the label or its nearest ancestor; -1 where there is none."""
    if node_id not in taxonomy:
        return -1
    index = {class_id: i for i, class_id in enumerate(class_ids)}
    return next((index[one] for one in (node_id, *taxonomy.ancestors(node_id)) if one in index), -1)


def answered(
    asked: Questions, run: Run, class_ids: Sequence[str], spec: ImageSpec, *, threads: int
) -> Answers:
    """Decode and score every image; one that cannot be decoded is left out and listed.

    Raises:
        NothingToExamine: none could be decoded.
    """
    heads, outputs = [], []
    for loaded in decoded(asked.images, spec, threads=threads):
        heads.append(loaded.select(["item_id", "status", "error"]))
        ok = usable(loaded)
        if ok.any():
            outputs.append(run(pixels.pixels_of(loaded, spec)[ok]))
    outcome = pa.concat_tables(heads)
    keep = usable(outcome)
    missing = asked.images.select(["uri"]).filter(pa.array(~keep))["uri"].to_pylist()
    reasons = outcome.filter(pa.array(~keep)).to_pylist()
    broken = [
        {"uri": uri, "status": row["status"], "error": row["error"] or ""}
        for uri, row in zip(missing, reasons, strict=True)
    ]
    if not outputs:
        raise NothingToExamine(f"none of {len(keep)} images can be decoded, such as {broken[0]}")
    logits_nc, probabilities_nc = (np.concatenate(parts) for parts in zip(*outputs, strict=True))
    scored = Scored(tuple(class_ids), logits_nc, probabilities_nc, asked.targets[keep])
    return Answers(scored, asked.images.filter(pa.array(keep)), broken)


def usable(outcome: pa.Table) -> Array:
    """Which rows have pixels, `bool[N]`."""
    return np.array([status == Status.OK for status in outcome["status"].to_pylist()])


def decoded(images: pa.Table, spec: ImageSpec, *, threads: int) -> Iterator[pa.Table]:
    """The images in chunks, in order, decoded ahead of their use by so many threads."""
    chunks = iter(
        [images.slice(start, ROWS_PER_CHUNK) for start in range(0, images.num_rows, ROWS_PER_CHUNK)]
    )
    with ThreadPoolExecutor(threads) as pool:

        def submit(count: int) -> list[Future[pa.Table]]:
            some = itertools.islice(chunks, count)
            return [pool.submit(pixels.decode_batch, chunk, spec, DecodeLimits()) for chunk in some]

        waiting = deque(submit(threads * CHUNKS_AHEAD))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(submit(1))
