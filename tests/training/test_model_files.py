"""What a model folder says of its pixels and classes is read in one place, and nothing in it is ignored."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor

from pipelines.datasets.normalize import normalize
from pipelines.images.prepare import prepare
from pipelines.messages import InputError
from pipelines.specs import ImageSpec, ModelSpec
from pipelines.training import model as vit
from pipelines.training import model_files
from pipelines.training.recipe import Recipe
from tests.training.test_model import DEEP

CROPPED = ImageSpec(height=16, width=16, fit="crop", resample="bicubic", mean=(0.4, 0.5, 0.6))


def spec_of(folder, processor, config=None) -> ImageSpec:
    """What is read of a model folder with this preprocessor_config.json."""
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", **(config or {})}))
    return model_files.read_image_spec(str(folder))


def kind(name: str) -> dict[str, str]:
    return {"image_processor_type": f"{name}ImageProcessor"}


@pytest.mark.parametrize(
    ("processor", "fit", "sides", "fraction"),
    [
        ({"size": 224}, "stretch", (224, 224), 1),
        ({"size": {"height": 32, "width": 48}}, "stretch", (32, 48), 1),
        ({**kind("CLIP"), "size": 96, "crop_size": 96}, "crop", (96, 96), 1),
        ({**kind("Bit"), "size": {"shortest_edge": 256}, "crop_size": 224}, "crop", (224, 224), 0.875),
        ({"size": 96, "do_center_crop": True, "crop_size": 48}, "stretch", (48, 48), 0.5),
        ({"feature_extractor_type": "DeiTFeatureExtractor"}, "stretch", (224, 224), 0.875),
        ({**kind("ConvNext"), "size": {"shortest_edge": 384}}, "stretch", (384, 384), 1),
        ({**kind("ConvNext"), "size": 224, "crop_pct": 0.9}, "crop", (224, 224), 224 / 248),
    ],
)
def test_sizes_of_hugging_face_processors_are_understood(tmp_path, processor, fit, sides, fraction):
    """What a file leaves out is what the class of transformers does."""
    spec = spec_of(tmp_path, processor)
    assert (spec.fit, (spec.height, spec.width), spec.crop_fraction) == (fit, sides, fraction)


@pytest.mark.parametrize(
    ("processor", "mean", "std"),
    [
        ({"do_normalize": False, "image_mean": [0.5] * 3}, 0, 1),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]}, 0.5, 0.5),
        ({"do_rescale": False, "image_mean": [51] * 3, "image_std": [102] * 3}, 0.2, 0.4),
    ],
)
def test_mean_and_std_are_of_values_up_to_one_whatever_the_rescaling(tmp_path, processor, mean, std):
    spec = spec_of(tmp_path, processor)
    assert (spec.mean, spec.std) == (pytest.approx((mean,) * 3), pytest.approx((std,) * 3))


@pytest.mark.parametrize(
    ("processor", "named"),
    [
        ({"resample": 0}, "resample 0"),
        ({"do_resize": False}, "do_resize False"),
        ({"do_pad": True}, "do_pad True"),
        ({"size": {"longest_edge": 224}}, "size"),
        ({**kind("CLIP"), "do_center_crop": False}, "do_center_crop False"),
        ({**kind("CLIP"), "crop_size": {"height": 200, "width": 224}}, r"crop_size \(200, 224\)"),
        ({**kind("CLIP"), "crop_size": 256}, "crop_size"),
        (kind("EfficientNet"), "image_processor_type EfficientNetImageProcessor"),
        (kind("Levit"), "image_processor_type LevitImageProcessor"),
        (kind("Unheard"), "Unrecognized image processor"),
    ],
)
def test_what_a_spec_cannot_say_is_refused_by_name(tmp_path, processor, named):
    """Certified all the same, a ConvNeXt without its crop agreed with Hugging Face in 82 % of the labels."""
    with pytest.raises(InputError, match=f"preprocessor_config.json .*{named}"):
        spec_of(tmp_path, processor)


def test_model_out_of_reach_is_not_taken_for_one_without_a_preprocessor(monkeypatch, caplog):
    def out_of_reach(*_, **__):
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(AutoConfig, "from_pretrained", out_of_reach)
    with pytest.raises(InputError, match="model google/vit cannot be loaded: We couldn't connect"):
        model_files.read_image_spec("google/vit")
    assert not caplog.records


def saved(folder, spec):
    model = vit.build(DEEP, vit.Classes(("cat", "dog"), False))
    model_files.write_model(model, folder, ModelSpec(("cat", "dog"), "labels", spec, temperature=1.5))
    return folder


@pytest.mark.parametrize("without_ours", [False, True])
def test_fine_tuning_keeps_the_crop_and_the_filter_of_the_checkpoint(tmp_path, without_ours):
    """Stretched with another filter, a checkpoint would be trained on other pixels than it was made for."""
    saved(tmp_path, CROPPED)
    if without_ours:
        (tmp_path / "iab_vision.json").unlink()
    recipe = Recipe(model=str(tmp_path))
    assert vit.image_spec(recipe) == CROPPED
    padded = vit.image_spec(replace(recipe, fit="pad", resample="lanczos", image_size=32))
    assert padded == replace(CROPPED, fit="pad", resample="lanczos", height=32, width=32)
    with pytest.raises(InputError, match="and fit is pad"):
        vit.image_spec(replace(recipe, fit="pad", crop_fraction=0.9))


def test_model_spec_reads_back_as_written(tmp_path):
    spec = ModelSpec(("cat", "dog"), "labels", CROPPED, temperature=1.5)
    assert model_files.read_model_spec(saved(tmp_path, CROPPED), "here") == spec


def test_unknown_key_of_ours_is_refused_by_name(tmp_path):
    path = saved(tmp_path, CROPPED) / "iab_vision.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "temprature": 2}))
    with pytest.raises(InputError, match="temprature"):
        model_files.read_model_spec(tmp_path, "here")


@pytest.mark.parametrize(
    "spec",
    [CROPPED, replace(CROPPED, crop_fraction=0.5), ImageSpec(height=16, width=24, crop_fraction=0.8)],
)
def test_transformers_processor_makes_the_same_pixels(tmp_path, spec):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(model_files.preprocessor_config(spec)))
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8)).resize((97, 48), 2)
    picture.save(tmp_path / "picture.png")
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    expected = processor(picture, return_tensors="np")["pixel_values"]
    pixels_hwc = prepare((tmp_path / "picture.png").read_bytes(), spec).pixels_hwc
    found = normalize(torch.from_numpy(pixels_hwc.copy())[None], spec).numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 0.01, "one of 255 levels is 0.008"
    assert model_files.preprocessor_config(replace(spec, fit="pad", crop_fraction=1)) is None
