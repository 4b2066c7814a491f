"""Raw logits of a trained model for decoded images, computed on the cluster in float32.

The PyTorch side of evaluation: what calibration is fitted on and what export is compared with. Serving
runs the exported graph instead.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.datasets.normalize import normalize
from pipelines.datasets.pixels import IngestError, pixels_of
from pipelines.status import Status
from pipelines.training.checkpoints import Sidecar
from pipelines.training.resources import Resources

BATCH = 256


class Scorer:
    """One model on one device; batches of decoded images in, their logits out."""

    def __init__(self, files: Mapping[str, bytes], sidecar: Sidecar, device: str) -> None:
        self.model = network(files).to(device)
        self.sidecar, self.device = sidecar, device

    def __call__(self, batch: pa.Table) -> pa.Table:
        import torch

        spec = self.sidecar.image_spec
        pixels = torch.from_numpy(pixels_of(batch, spec).copy()).to(self.device)
        with torch.inference_mode():
            logits = self.model(pixel_values=normalize(pixels, spec)).logits.cpu().numpy()
        values = pa.FixedSizeListArray.from_arrays(pa.array(logits.ravel()), logits.shape[1])
        return pa.table({"item_id": batch["item_id"], "status": batch["status"], "logits": values})


def score(
    dataset: Any,
    rows: npt.NDArray[np.int64],
    files: Mapping[str, bytes],
    sidecar: Sidecar,
    resources: Resources,
) -> npt.NDArray[np.float32]:
    """Logits [len(rows), classes] of these rows of a decoded dataset, in their order.

    Raises:
        IngestError: a row of a streamed dataset could be read before and cannot now.
    """
    import ray

    scored = dataset.map_batches(
        Scorer,
        fn_constructor_args=(dict(files), sidecar, "cuda" if resources.use_gpu else "cpu"),
        batch_size=BATCH,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=resources.num_workers),
        num_gpus=1 if resources.use_gpu else None,
    )
    table = pa.concat_tables(ray.get(scored.to_arrow_refs())).sort_by("item_id")
    logits_nc: npt.NDArray[np.float32] = table["logits"].combine_chunks().flatten().to_numpy()
    places = np.searchsorted(table["item_id"].to_numpy(), rows)
    lost = pa.compute.sum(pa.compute.not_equal(table["status"].take(pa.array(places)), Status.OK)).as_py()
    if lost:
        raise IngestError(
            f"{lost} of {len(rows)} images to measure could be read before training and cannot now; the same "
            "command measures again without training again. --ingest.mode disk reads every image once"
        )
    return logits_nc.reshape(table.num_rows, -1)[places]


def network(files: Mapping[str, bytes]) -> Any:
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
