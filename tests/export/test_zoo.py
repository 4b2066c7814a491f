"""Every kind of image classifier that users bring exports and passes, single- or multi-label, however small.

Random weights at unequal sizes: what is tested is that nothing about an architecture is lost or transposed.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageOps

from export import certificate, convert, images, parity, published, quantize
from export.certificate import Candidate
from export.reference import standardize, torch_reference
from pipelines.bundle.limits import LIMITS
from pipelines.bundle.session import OnnxModel
from pipelines.bundle.settings import RuntimeSpec
from pipelines.images.prepare import prepare
from pipelines.specs import ImageSpec, ModelSpec
from pipelines.taxonomy import taxonomy
from pipelines.training import layers, model_files
from pipelines.training import model as vit
from pipelines.training.recipe import Optimizer, Recipe
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


@pytest.mark.parametrize(
    ("name", "multi_label"), [*((name, False) for name in ZOO), ("ViT", True), ("ConvNext", True)]
)
def test_architecture_exports_and_passes(name, multi_label):
    """Multi-label models differ behind the logits alone: one with attention and one without are enough."""
    class_ids = tuple(f"class {index}" for index in range(N_CLASSES))
    spec = ModelSpec(class_ids, "labels", spec_of(name), multi_label, temperature=1.7)
    sample = images.edge_cases()
    reference, document = certify(classifier(name), spec, sample)
    assert document["passed"], document["failures"]
    assert document["images"]["compared"] == len(sample)
    total = reference.outputs.probabilities_nc.sum(axis=1)
    assert (np.abs(total - 1) > 1e-3).all() if multi_label else np.allclose(total, 1)


def certify(network: torch.nn.Module, spec: ModelSpec, sample: tuple[images.Sample, ...]) -> tuple[Any, Any]:
    """The reference and the certificate of the exported network."""
    contract = published.contract_of(spec, taxonomy.load("labels", labels=spec.class_ids))
    reference = certificate.run_reference(
        sample,
        np.full((len(sample), N_CLASSES), -1),
        network=torch_reference(network),
        contract=contract,
        description=type(network).__name__,
    )
    model = OnnxModel(convert.convert(network, spec, {}), RuntimeSpec(batch_size=4))
    return reference, certificate.measure(reference, Candidate(model, contract), "fp32")


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


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
DONE = {"do_normalize": True, "do_resize": True}
SMALL = {**ENCODER, "image_size": 224, "patch_size": 16, "intermediate_size": 80}
PUBLISHED = {
    "ViT": (SMALL, {"size": 224, "resample": 2, **HALF, "feature_extractor_type": "ViTFeatureExtractor"}),
    "DeiT": (
        SMALL,
        {"size": 256, "do_center_crop": True, "crop_size": 224, "resample": 3, **IMAGENET}
        | {"feature_extractor_type": "DeiTFeatureExtractor"},
    ),
    "Beit": (
        {**SMALL, "use_relative_position_bias": True},
        {"size": 224, "do_center_crop": False, "crop_size": 224, "resample": 2, **HALF}
        | {"feature_extractor_type": "BeitFeatureExtractor"},
    ),
    "Swin": (
        {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "window_size": 7, "image_size": 224}
        | {"initializer_range": 0.2},
        {"size": 224, "resample": 3, **IMAGENET, "feature_extractor_type": "ViTFeatureExtractor"},
    ),
    "Dinov2": (
        {**ENCODER, "image_size": 518, "patch_size": 14, "mlp_ratio": 2},
        {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
        | {"resample": 3, **IMAGENET, "do_rescale": True, "rescale_factor": 0.00392156862745098}
        | {"do_convert_rgb": True, "image_processor_type": "BitImageProcessor"},
    ),
    "ConvNext": (
        {**ZOO["ConvNext"], "image_size": 224},
        {"size": 224, "crop_pct": 0.875, "resample": 3, **IMAGENET}
        | {"feature_extractor_type": "ConvNextFeatureExtractor"},
    ),
    "Siglip": (
        {"vision_config": SMALL},
        {"size": {"height": 224, "width": 224}, "resample": 3, **HALF, "do_rescale": True}
        | {"rescale_factor": 0.00392156862745098, "image_processor_type": "SiglipImageProcessor"},
    ),
}
"""What the hub's config.json and preprocessor_config.json say of sizes and pixels, at a small width."""
N_PHOTOS = 20
MAX_RELATIVE_LOGIT = 0.15
"""Of one photograph: JPEGs are decoded at a reduced scale here, which sharpens them a little."""


def as_published(name: str, folder: Path) -> torch.nn.Module:
    """A classifier of random weights in a folder as on the hub."""
    settings, processor = PUBLISHED[name]
    torch.manual_seed(5)
    config = getattr(transformers, f"{name}Config")(num_labels=N_CLASSES, **settings)
    network = getattr(transformers, f"{name}ForImageClassification")(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**DONE, **processor}))
    return network.eval()


def agreement(folder: Path, network: torch.nn.Module, files: list[Path]) -> tuple[float, float]:
    """Share of the same best class, and the largest relative difference of an image's logits."""
    spec = model_files.read_model_spec(folder, name := str(folder)).image_spec
    ours = [prepare(file.read_bytes(), spec).pixels_hwc for file in files]
    processor = transformers.AutoImageProcessor.from_pretrained(name, backend="pil")
    upright = [ImageOps.exif_transpose(Image.open(file)).convert("RGB") for file in files]
    theirs = [processor(one, return_tensors="np")["pixel_values"][0] for one in upright]
    with torch.no_grad():
        of_both = [
            network(pixel_values=torch.from_numpy(np.ascontiguousarray(pixels))).logits.numpy()
            for pixels in (standardize(np.stack(ours), spec), np.stack(theirs))
        ]
    centre = of_both[1].mean(axis=0)  # random weights prefer one class for every picture
    found_nc, expected_nc = (logits_nc - centre for logits_nc in of_both)
    relative = np.abs(found_nc - expected_nc).max(axis=1) / np.abs(expected_nc).max()
    return float((found_nc.argmax(1) == expected_nc.argmax(1)).mean()), float(relative.max())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_sees_photos_as_transformers_shows_them(name, photos, tmp_path):
    files = sorted(photos.glob("*/*.jpg"))
    same, relative = agreement(tmp_path, as_published(name, tmp_path), files[:: len(files) // N_PHOTOS])
    assert same >= 0.99 and relative <= MAX_RELATIVE_LOGIT


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_fine_tuned_exported_and_certified_at_its_preprocessors_size(name, tmp_path):
    as_published(name, tmp_path / "hub")
    recipe, classes = Recipe(model=str(tmp_path / "hub")), tuple(f"class {i}" for i in range(N_CLASSES))
    image = vit.image_spec(recipe)
    assert (image.height, image.width) == (224, 224), "DINOv2's config says 518"
    recipe = Recipe(model=recipe.model, image_size=image.height).resolved(multi_label=False)
    network = vit.build(recipe, vit.Classes(classes, False))
    pixels_nhwc = np.stack(images.decode([one.payload for one in images.edge_cases()[:4]], image))
    layers.set_training(network)
    adam = torch.optim.AdamW(layers.parameter_groups(network, Optimizer(learning_rate=1e-3)))
    logits_nc = network(pixel_values=torch.from_numpy(standardize(pixels_nhwc, image))).logits
    torch.nn.functional.cross_entropy(logits_nc, torch.arange(4)).backward()
    adam.step()
    spec = ModelSpec(classes, "labels", image, temperature=1.7)
    (tmp_path / "best").mkdir()
    model_files.write_model(network, tmp_path / "best", spec)
    assert model_files.read_model_spec(tmp_path / "best", "best") == spec
    document = certify(network.eval(), spec, images.edge_cases()[:6])[1]
    assert document["passed"], document["failures"]
