"""A trained model's files -> predictions of decoded images on the cluster, in float32.

Trained weights may have been run in a lower precision; what is calibrated, reported and compared at export is
float32. Serving runs the exported graph instead.
"""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.evaluation.models import TorchModel
from pipelines.evaluation.score import predict_batch
from pipelines.specs import ModelSpec
from pipelines.training.resources import Resources

BATCH = 256


class Predictor:
    """One model on one device; batches of decoded images in, their predictions out."""

    def __init__(self, files: Mapping[str, bytes], model_spec: ModelSpec, device: str) -> None:
        self.spec = model_spec.image_spec
        self.predict = TorchModel(load_network(files).to(device), model_spec)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return predict_batch(batch, self.predict, self.spec)


def predict_on_cluster(
    dataset: Any, files: Mapping[str, bytes], model_spec: ModelSpec, resources: Resources
) -> Iterator[pa.Table]:
    """Predictions of every row of a decoded dataset, before any temperature."""
    import ray

    predicted = dataset.map_batches(
        Predictor,
        fn_constructor_args=(dict(files), model_spec, "cuda" if resources.use_gpu else "cpu"),
        batch_size=BATCH,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=resources.num_workers),
        num_gpus=1 if resources.use_gpu else None,
    )
    yield from ray.get(predicted.to_arrow_refs())


def load_network(files: Mapping[str, bytes]) -> Any:
    """The model in these files, in float32 and evaluation mode."""
    import torch
    from transformers import AutoModelForImageClassification
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        for name, payload in files.items():
            Path(folder, name).write_bytes(payload)
        model = AutoModelForImageClassification.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True
        )
    return model.eval()
