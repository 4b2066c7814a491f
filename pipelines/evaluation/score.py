"""Decoded images and a model -> `Scored`: the one way to scores, at the end of training and in `evaluate`.

`predict_batch` runs a model over one batch of decoded images. Who calls it differs: actors on a Ray cluster,
or `predict_on_threads` in one process. `score` puts the predictions and the right answers together.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from pipelines.datasets import pixels
from pipelines.evaluation.eval_set import EvalSet
from pipelines.evaluation.evaluation import Scored
from pipelines.evaluation.metrics import Array
from pipelines.images.pixels import pixels_of
from pipelines.machine import map_ahead
from pipelines.messages import JobFailed
from pipelines.specs import ImageSpec
from pipelines.status import Status

ROWS_PER_CHUNK = 64
"""Images that a thread decodes at once, and that the model then takes."""
CHUNKS_AHEAD = 2
"""Decoded chunks in hand per thread: 64 images of 224 pixels are 10 MB."""

Predict = Callable[[Array], tuple[Array, Array]]
"""uint8 pixels [n, height, width, 3] -> logits and probabilities, float32 [n, classes]."""
PredictImages = Callable[[pa.Table], Iterable[pa.Table]]
"""Rows of a labelled dataset -> `predict_batch` of each of them, in any order."""


@dataclass(frozen=True)
class EvalResult:
    """The scores of an `EvalSet`."""

    scored: Scored
    images: pa.Table
    """The rows of `scored`, in its order."""
    unreadable: list[dict[str, str]]
    """Images that could not be decoded: uri, status, error."""

    @property
    def slices(self) -> dict[str, list[str | None]]:
        """Column to slice by -> its value for each image."""
        rows = [dict(row or ()) for row in self.images["slices"].to_pylist()]
        return {name: [row.get(name) for row in rows] for name in dict.fromkeys(itertools.chain(*rows))}


def predict_batch(batch: pa.Table, predict: Predict, spec: ImageSpec) -> pa.Table:
    """Logits and probabilities of decoded images; those of an image without pixels mean nothing."""
    outputs = predict(pixels_of(batch["pixels"], spec))
    logits, scores = (pa.FixedSizeListArray.from_arrays(pa.array(nc.ravel()), nc.shape[1]) for nc in outputs)
    head = batch.select(["item_id", "status", "error"])
    return head.append_column("logits", logits).append_column("probabilities", scores)


def predict_on_threads(
    images: pa.Table, predict: Predict, spec: ImageSpec, *, threads: int
) -> Iterator[pa.Table]:
    """Predictions of the images: so many threads decode, this one runs the model."""
    chunks = [images.slice(start, ROWS_PER_CHUNK) for start in range(0, images.num_rows, ROWS_PER_CHUNK)]
    decode = partial(pixels.decode_batch, spec=spec)
    for decoded in map_ahead(decode, chunks, threads=threads, ahead=threads * CHUNKS_AHEAD):
        yield predict_batch(decoded, predict, spec)


def score(eval_set: EvalSet, class_ids: Sequence[str], predictions: Iterable[pa.Table]) -> EvalResult:
    """The scores of the set's images from the predictions of at least these, in any order.

    Raises:
        JobFailed: none could be decoded.
    """
    table = pa.concat_tables(predictions).sort_by("item_id")
    places = np.searchsorted(table["item_id"].to_numpy(), eval_set.images["item_id"].to_numpy())
    table = table.take(pa.array(places))
    usable = pa.compute.equal(table["status"], Status.OK)
    unreadable = list_unreadable(eval_set.images, table, pa.compute.invert(usable))
    if len(unreadable) == table.num_rows:
        raise JobFailed(f"none of {table.num_rows} images can be decoded, such as {unreadable[0]}")
    kept = table.filter(usable)
    logits_nc, scores_nc = (
        kept[name].combine_chunks().flatten().to_numpy().reshape(-1, len(class_ids))
        for name in ("logits", "probabilities")
    )
    scored = Scored(tuple(class_ids), logits_nc, scores_nc, eval_set.targets[usable.to_numpy()])
    return EvalResult(scored, eval_set.images.filter(usable), unreadable)


def list_unreadable(images: pa.Table, outcome: pa.Table, unusable: pa.ChunkedArray) -> list[dict[str, str]]:
    uris = images["uri"].filter(unusable).to_pylist()
    reasons = outcome.select(["status", "error"]).filter(unusable).to_pylist()
    return [
        {"uri": uri, "status": row["status"], "error": row["error"] or ""}
        for uri, row in zip(uris, reasons, strict=True)
    ]
