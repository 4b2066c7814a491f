"""A released bundle, or a PyTorch classifier -> a model that can be evaluated.

A bundle runs as it is served: ONNX Runtime, its own precision. A checkpoint runs as it was trained: PyTorch
in float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from pipelines.evaluation.score import Predict
from pipelines.messages import redact
from pipelines.specs import ImageSpec
from pipelines.storage.uris import join
from pipelines.taxonomy.taxonomy import Taxonomy


@dataclass(frozen=True)
class EvaluatedModel:
    """The model that is evaluated, whatever it is stored as."""

    name: str
    class_ids: Sequence[str]
    taxonomy: Taxonomy
    taxonomy_reference: str
    """What `taxonomy.load` finds it by; `labels` for flat ones."""
    image_spec: ImageSpec
    thresholds: Mapping[str, float]
    multi_label: bool
    predict: Predict
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
    image_spec: ImageSpec
    multi_label: bool
    temperature: float = 1.0

    def __call__(self, pixels_nhwc: Array) -> tuple[Array, Array]:
        """Logits and probabilities, float32 [n, classes]."""
        with torch.inference_mode():
            pixels = torch.from_numpy(np.array(pixels_nhwc)).to(self.network.device)
            inputs_nchw = normalize(pixels, self.image_spec)
            logits_nc = self.network(pixel_values=inputs_nchw).logits.cpu().numpy()
        scores_nc = metrics.probabilities(
            logits_nc, temperature=self.temperature, multi_label=self.multi_label
        )
        return logits_nc, scores_nc


def load_bundle_model(uri: str, bundle: Bundle, spec: RuntimeSpec, *, certificate: str) -> EvaluatedModel:
    """The bundle's ONNX model, in the session that classify would use."""
    has_own_table = bundles.TAXONOMY_FILE in bundle.manifest.files
    return EvaluatedModel(
        name=f"{redact(uri)} ({bundle.model_id}, {spec.precision} on {spec.provider})",
        class_ids=bundle.class_ids,
        taxonomy=bundle.taxonomy(),
        taxonomy_reference=join(uri, bundles.TAXONOMY_FILE) if has_own_table else bundle.taxonomy_name,
        image_spec=bundle.image_spec,
        thresholds=bundle.thresholds,
        multi_label=bundle.multi_label,
        predict=session.load(bundle, spec).run,
        certificate=certificate,
    )
