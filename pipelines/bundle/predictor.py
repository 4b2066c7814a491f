"""Rows of `schema.LOADED` with pixels -> rows of `schema.SCORED`, through a loaded model."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import schema
from pipelines.bundle import session
from pipelines.bundle.bundle import Bundle
from pipelines.bundle.labelling import Floats, Labeller, build_labeller
from pipelines.bundle.settings import RuntimeSpec
from pipelines.images.pixels import pixels_of
from pipelines.images.prepare import Pixels
from pipelines.specs import ImageSpec
from pipelines.status import Status

Run = Callable[[Pixels], tuple[Floats, Floats]]
"""uint8 pixels [n, height, width, 3] -> logits and probabilities [n, classes]."""


class Predictor:
    """A loaded model and what its probabilities mean."""

    def __init__(self, run: Run, labels: Labeller, spec: ImageSpec) -> None:
        self._run, self._labels, self._spec = run, labels, spec

    def score(self, loaded: pa.Table) -> pa.Table:
        """Rows of `schema.SCORED`, in the order they came; rows without pixels pass through unlabelled."""
        ok = pc.equal(loaded["status"], Status.OK.value).to_numpy()
        head = loaded.drop_columns(["pixels"])
        if not ok.any():
            return _spread(head, None, ok)
        pixels_nhwc = pixels_of(loaded["pixels"], self._spec)
        _, probabilities_nc = self._run(pixels_nhwc if ok.all() else pixels_nhwc[ok])
        finite = np.isfinite(probabilities_nc).all(axis=1)
        if not finite.all():
            head = _with_model_errors(head, np.flatnonzero(ok)[~finite])
            ok[ok] = finite
        labels = self._labels.label(probabilities_nc[finite]) if finite.any() else None
        return _spread(head, labels, ok)


def _with_model_errors(head: pa.Table, positions: npt.NDArray[np.int64]) -> pa.Table:
    """Rows whose probabilities are not numbers say so; such a label would sort above every real one."""
    failed = np.zeros(head.num_rows, bool)
    failed[positions] = True
    mask = pa.array(failed)
    status = pc.if_else(mask, Status.MODEL_ERROR.value, head["status"])
    error = pc.if_else(mask, "the model's probabilities are not finite", head["error"])
    head = head.set_column(head.schema.get_field_index("status"), "status", status)
    return head.set_column(head.schema.get_field_index("error"), "error", error)


def _spread(head: pa.Table, labels: pa.Table | None, ok: npt.NDArray[np.bool_]) -> pa.Table:
    """Give the labels of the `ok` rows to them; the others hold nulls."""
    columns = {name: head[name] for name in schema.LOADED.names}
    positions = pa.array(np.cumsum(ok) - 1, pa.int64(), mask=~ok)
    for field in schema.SCORED:
        if field.name in columns:
            continue
        if labels is None:
            columns[field.name] = pa.nulls(len(ok), field.type)
        else:
            columns[field.name] = labels[field.name].combine_chunks().take(positions)
    return pa.table(columns).cast(schema.SCORED)


def open_predictor(bundle: Bundle, spec: RuntimeSpec, top_k: int) -> Predictor:
    """The predictor of an opened bundle; whether it is certified is for the caller to have checked."""
    labels = build_labeller(bundle.spec, bundle.taxonomy(), top_k=top_k)
    return Predictor(session.load(bundle, spec).run, labels, bundle.spec.image_spec)
