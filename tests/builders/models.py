"""Image classifiers of a few thousand weights, saved as training saves them, and pictures to tell apart.

Every size differs from every other, so that a transposition cannot pass unnoticed. `fitted` gives a
network a head that really separates the classes: a random one leaves every image a near-tie.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow as pa
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from pipelines.bundle import bundle
from pipelines.bundle.limits import LIMITS
from pipelines.bundle.manifest import MODEL_FILES, Manifest, record
from pipelines.bundle.providers import vector_extensions
from pipelines.specs import ImageSpec, ModelSpec

CLASS_IDS = ("483", "1", "v9i3On", "425", "552")
SPEC = ImageSpec(height=40, width=56, mean=(0.5, 0.45, 0.4), std=(0.25, 0.2, 0.3))
TEMPERATURE = 1.3
PASSED = {
    "passed": True,
    "failures": [],
    "environment": {
        "batch_size": 16,
        "buckets": [1, 2, 4, 8, 16],
        "allow_tf32": False,
        "onnxruntime": onnxruntime.__version__,
        "vector_extensions": vector_extensions(),
    },
    "limits": dataclasses.asdict(LIMITS["fp32"]),
    "images": {"own": 32},
}
"""What of a certificate the readers of a bundle look at."""
COLOURS = ((220, 60, 40), (40, 200, 60), (50, 70, 230), (230, 210, 40), (200, 60, 210))


def picture(class_index: int, rng: np.random.Generator, size: tuple[int, int] = (90, 70)) -> Image.Image:
    """A patch of the class's colour somewhere on noise."""
    width, height = size
    canvas_hwc = rng.integers(60, 190, (height, width, 3), dtype=np.uint8)
    x, y = rng.integers(0, width // 3), rng.integers(0, height // 3)
    canvas_hwc[y : y + height // 2, x : x + width // 2] = COLOURS[class_index]
    return Image.fromarray(canvas_hwc)


def dataset(folder: Path, count: int = 60) -> Path:
    """A labelled dataset of validation pictures; every fifth is stored rotated."""
    rng = np.random.default_rng(7)
    folder.mkdir(parents=True)
    lines = ["file,label,split"]
    for index in range(count):
        label = index % len(CLASS_IDS)
        exif = Image.Exif()
        exif[0x0112] = 6 if index % 5 == 0 else 1
        picture(label, rng).save(folder / f"{index}.jpg", quality=92, exif=exif)
        lines.append(f"{index}.jpg,{CLASS_IDS[label]},validation")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def checkpoint(folder: Path, *, multi_label: bool = False, network=None, spec: ImageSpec = SPEC) -> Path:
    """A checkpoint folder as training leaves it; a fitted ViT unless another network is given."""
    network = network or fitted(vit(spec=spec), spec)
    network.config.id2label = dict(enumerate(CLASS_IDS))
    network.config.label2id = {class_id: index for index, class_id in enumerate(CLASS_IDS)}
    network.config.problem_type = f"{'multi' if multi_label else 'single'}_label_classification"
    network.save_pretrained(folder)
    ours = {
        "taxonomy": "3.1",
        "class_ids": CLASS_IDS,
        "image_spec": dataclasses.asdict(spec),
        "temperature": TEMPERATURE,
        "thresholds": {"483": 0.6},
        "multi_label": multi_label,
        "labels_are_ids": True,
    }
    (folder / "iab_vision.json").write_text(json.dumps(ours))
    return folder


def vit(seed: int = 3, spec: ImageSpec = SPEC):
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=80,
        image_size=(spec.height, spec.width),
        patch_size=8,
        num_labels=len(CLASS_IDS),
        initializer_range=0.1,
    )
    return ViTForImageClassification(config).eval()


def fitted(network, spec: ImageSpec):
    """Solve the last layer for the drawn pictures (ridge regression on the random features below it)."""
    import torch

    from export.reference import standardize

    rng = np.random.default_rng(1)
    labels = np.arange(200) % len(CLASS_IDS)
    pixels_nhwc = np.stack(
        [np.asarray(picture(label, rng).resize((spec.width, spec.height))) for label in labels]
    )
    features = []
    hook = network.classifier.register_forward_hook(lambda module, inputs, output: features.append(inputs[0]))
    with torch.inference_mode():
        network(pixel_values=torch.from_numpy(standardize(pixels_nhwc, spec)))
    hook.remove()
    x = torch.cat([features[0], torch.ones(len(labels), 1)], dim=1).double()
    y = torch.nn.functional.one_hot(torch.from_numpy(labels), len(CLASS_IDS)).double() * 10 - 2
    solution = torch.linalg.solve(x.T @ x + 1e-2 * torch.eye(x.shape[1]), x.T @ y).float()
    with torch.no_grad():
        network.classifier.weight.copy_(solution[:-1].T)
        network.classifier.bias.copy_(solution[-1])
    return network


def small_graph(n_classes: int = 5, height: int = 4, width: int = 6) -> bytes:
    """An ONNX file with our inputs and outputs, made without torch: one random product."""
    weight = np.random.default_rng(0).normal(0, 1e-2, (height * width * 3, n_classes)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["pixels"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["values"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", height, width, 3])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", n_classes])
            for name in ("logits", "probabilities")
        ],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return model.SerializeToString()


def small_bundle(uri: str | Path, *, certificates=None, thresholds=None) -> Manifest:
    """A bundle around `small_graph`, with a passing cpu-fp32 certificate unless others are given."""
    labels = pa.table(
        {
            "class_index": range(5),
            "id": CLASS_IDS,
            "parent_id": [None] * 5,
            "name": CLASS_IDS,
            "path": CLASS_IDS,
            "tier": [1] * 5,
        },
        schema=bundle.LABELS,
    )
    passed = {("cpu", "fp32"): PASSED} if certificates is None else certificates
    precisions = {"fp32", *(precision for _, precision in passed)}
    files = {MODEL_FILES[precision]: small_graph() for precision in sorted(precisions)}
    files["labels.parquet"] = bundle.labels_bytes(labels)
    manifest = Manifest(
        model=ModelSpec(
            CLASS_IDS, "iab-content-3.1", ImageSpec(height=4, width=6), thresholds=thresholds or {"483": 0.5}
        ),
        cattax=9,
        temperatures=dict.fromkeys(precisions, 1.0),
        opset=23,
        ir_version=10,
        versions={},
        source={"architecture": "small"},
        files={name: record(payload) for name, payload in files.items()},
    )
    bundle.write_bundle(str(uri), files, manifest)
    for (provider, precision), content in passed.items():
        bundle.add_certificate(str(uri), manifest, provider, precision, content)
    return manifest
