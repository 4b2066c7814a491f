"""Every kind of image classifier that users bring exports and passes, single- or multi-label, however small.

Random weights at unequal sizes: what is tested is that nothing about an architecture is lost or transposed.
"""

import numpy as np
import pytest
import torch
import transformers

from export import certificate, convert, images, parity, published, quantize
from export.certificate import Candidate
from export.reference import torch_reference
from pipelines.bundle.limits import LIMITS
from pipelines.bundle.session import OnnxModel
from pipelines.bundle.settings import RuntimeSpec
from pipelines.specs import ImageSpec, ModelSpec
from pipelines.taxonomy import taxonomy
from tests.builders import models

pytestmark = pytest.mark.slow
N_CLASSES = 7
ENCODER = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": (40, 56),
    "patch_size": 8,
    "initializer_range": 0.2,
}
ZOO = {
    "ViT": {**ENCODER, "intermediate_size": 80},
    "DeiT": {**ENCODER, "intermediate_size": 80},
    "Beit": {**ENCODER, "intermediate_size": 80, "use_relative_position_bias": True},
    "Swin": {
        "embed_dim": 24, "depths": [2, 1], "num_heads": [2, 4], "window_size": 5,
        "image_size": (40, 80), "patch_size": 4, "initializer_range": 0.2,
    },
    "Dinov2": {**ENCODER, "image_size": 42, "patch_size": 7, "mlp_ratio": 2},
    "ConvNext": {
        "hidden_sizes": [12, 24, 36, 48], "depths": [1, 1, 2, 1],
        "image_size": 64, "initializer_range": 0.2,
    },
}  # fmt: skip


def classifier(name: str) -> torch.nn.Module:
    config = getattr(transformers, f"{name}Config")(num_labels=N_CLASSES, **ZOO[name])
    attention = {} if name == "ConvNext" else {"attn_implementation": "eager"}
    torch.manual_seed(5)
    network = getattr(transformers, f"{name}ForImageClassification")._from_config(config, **attention)
    with torch.no_grad():
        for parameter in network.parameters():  # layer scales and biases begin at values that hide mistakes
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def spec_of(name: str) -> ImageSpec:
    sides = ZOO[name]["image_size"]
    height, width = sides if isinstance(sides, tuple) else (sides, sides)
    return ImageSpec(height=height, width=width, mean=(0.5, 0.45, 0.4), std=(0.25, 0.2, 0.3))


@pytest.fixture(autouse=True)
def _no_speed_measured(monkeypatch) -> None:
    monkeypatch.setattr(certificate, "SPEED_S", 0.0)


@pytest.mark.parametrize("multi_label", [False, True], ids=["single-label", "multi-label"])
@pytest.mark.parametrize("name", ZOO)
def test_architecture_exports_and_passes(name, multi_label):
    class_ids = tuple(f"class {index}" for index in range(N_CLASSES))
    spec = ModelSpec(class_ids, "labels", spec_of(name), multi_label, temperature=1.7)
    contract = published.contract_of(spec, taxonomy.load("labels", labels=class_ids))
    network = classifier(name)
    sample = images.edge_cases()
    reference = certificate.run_reference(
        sample,
        np.full((len(sample), N_CLASSES), -1),
        network=torch_reference(network),
        contract=contract,
        description=name,
    )
    payload = convert.convert(network, spec, {})
    model = OnnxModel(payload, RuntimeSpec(batch_size=4))
    document = certificate.measure(reference, Candidate(model, contract), "fp32")
    assert document["passed"], document["failures"]
    assert document["images"]["compared"] == len(sample)
    total = reference.outputs.probabilities_nc.sum(axis=1)
    assert (np.abs(total - 1) > 1e-3).all() if multi_label else np.allclose(total, 1)


def pictures(spec: ImageSpec) -> np.ndarray:
    """uint8 [40, height, width, 3]: as many as int8 needs to be calibrated on."""
    rng = np.random.default_rng(2)
    drawn = [models.picture(index % 5, rng, (spec.width, spec.height)) for index in range(40)]
    return np.stack([np.asarray(one) for one in drawn])


@pytest.mark.parametrize("name", ZOO)
def test_smaller_precisions_of_an_architecture_stay_close_and_ignore_batch_mates(name):
    """What random weights can show: their labels are near-ties, so agreement means nothing here."""
    spec = ModelSpec((), "labels", spec_of(name), temperature=1.7)
    network, pixels_nhwc = classifier(name), pictures(spec_of(name))
    portable = convert.convert(network, spec, {})
    expected_nc = OnnxModel(portable, RuntimeSpec()).run(pixels_nhwc)[0]
    graphs = {
        "fp16": quantize.half(network, spec, {}),
        "int8": quantize.quantize_int8(portable, pixels_nhwc, spec, {}),
    }
    for kind, graph in graphs.items():
        model = OnnxModel(graph.payload, RuntimeSpec(batch_size=4))
        limits = LIMITS[kind]
        assert parity.relative(model.run(pixels_nhwc)[0], expected_nc) <= limits.max_relative_logit, kind
        assert parity.batch_invariance(model, pixels_nhwc)["max_change"] <= limits.max_batch_change, kind
