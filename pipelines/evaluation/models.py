"""A released bundle, or a PyTorch classifier -> a model that can be evaluated.

A bundle runs as it is served: ONNX Runtime, its own precision. A checkpoint runs as it was trained: PyTorch
in float32.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pipelines.bundle import bundle as bundles
from pipelines.bundle import session
from pipelines.bundle.bundle import Bundle
from pipelines.bundle.settings import RuntimeSpec
from pipelines.datasets.normalize import normalize
from pipelines.evaluation import metrics
from pipelines.evaluation.metrics import Array
from pipelines.evaluation.score import PredictImages, predict_on_threads
from pipelines.messages import redact
from pipelines.specs import ModelSpec
from pipelines.storage.uris import join
from pipelines.taxonomy.taxonomy import Taxonomy


@dataclass(frozen=True)
class EvaluatedModel:
    """The model that is evaluated, whatever it is stored as."""

    name: str
    spec: ModelSpec
    taxonomy: Taxonomy
    predict: PredictImages
    certificate: str = "none needed: the checkpoint itself"
    """What the report says of its certificate."""
    network: Any = None
    """The PyTorch model, where there is one."""
    history: Sequence[Mapping[str, Any]] = ()
    """Lines of its metrics.jsonl."""


@dataclass(frozen=True)
class TorchModel:
    """A transformers image classifier as `Predict`, on the device where it is."""

    network: Any
    spec: ModelSpec

    def __call__(self, pixels_nhwc: Array) -> tuple[Array, Array]:
        """Logits and probabilities, float32 [n, classes]."""
        with torch.no_grad():
            pixels = torch.from_numpy(np.array(pixels_nhwc)).to(self.network.device)
            inputs_nchw = normalize(pixels, self.spec.image_spec)
            logits_nc = self.network(pixel_values=inputs_nchw).logits.cpu().numpy()
        scores_nc = metrics.probabilities(
            logits_nc, temperature=self.spec.temperature, multi_label=self.spec.multi_label
        )
        return logits_nc, scores_nc


def load_bundle_model(uri: str, bundle: Bundle, spec: RuntimeSpec, *, certificate: str) -> EvaluatedModel:
    """The bundle's ONNX model, in the session that classify would use."""
    has_own_table = bundles.TAXONOMY_FILE in bundle.manifest.files
    return EvaluatedModel(
        name=f"{redact(uri)} ({bundle.model_id}, {spec.precision} on {spec.provider})",
        spec=replace(bundle.spec, taxonomy=join(uri, bundles.TAXONOMY_FILE))
        if has_own_table
        else bundle.spec,
        taxonomy=bundle.taxonomy(),
        predict=functools.partial(
            predict_on_threads,
            predict=session.load(bundle, spec).run,
            spec=bundle.spec.image_spec,
            threads=spec.threads,
        ),
        certificate=certificate,
    )
