"""What a model folder says of its pixels and classes is read in one place, and nothing in it is ignored."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from pipelines.datasets.normalize import normalize
from pipelines.images.prepare import prepare
from pipelines.messages import InputError
from pipelines.specs import ImageSpec, ModelSpec
from pipelines.training import model as vit
from pipelines.training import model_files
from pipelines.training.model_files import parse_preprocessor
from pipelines.training.recipe import Recipe
from tests.training.test_model import DEEP

CROPPED = ImageSpec(height=16, width=16, fit="crop", resample="bicubic", mean=(0.4, 0.5, 0.6))


@pytest.mark.parametrize(
    ("processor", "fit", "sides"),
    [
        ({"size": 224}, "stretch", (224, 224)),
        ({"size": {"height": 32, "width": 48}}, "stretch", (32, 48)),
        ({"size": {"height": None, "width": None, "shortest_edge": 96}}, "crop", (96, 96)),
        ({"size": {"shortest_edge": 96}, "do_center_crop": True, "crop_size": 96}, "crop", (96, 96)),
        ({"size": 96, "do_center_crop": True, "crop_size": 96}, "crop", (96, 96)),
        ({"size": {"height": 96, "width": 96}, "do_center_crop": True, "crop_size": 96}, "stretch", (96, 96)),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, "stretch", (384, 384)),
    ],
)
def test_sizes_of_hugging_face_processors_are_understood(processor, fit, sides):
    found = parse_preprocessor(processor)
    assert (found.spec.fit, (found.spec.height, found.spec.width)) == (fit, sides)
    assert not found.unlike


def test_unnormalised_processor_gives_unnormalised_pixels():
    spec = parse_preprocessor({"size": 8, "do_normalize": False, "image_mean": [0.5] * 3}).spec
    assert (spec.mean, spec.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_rescale", False),
        ("rescale_factor", 1 / 127.5),
        ("rescale_offset", True),
        ("do_flip_channel_order", True),
        ("resample", 0),
        ("size", {"longest_edge": 224}),
    ],
)
def test_setting_that_changes_the_values_is_refused_by_name(key, value):
    """Certified all the same, a rescaling of 1/127.5 agreed with Hugging Face in 70 % of the labels."""
    with pytest.raises(InputError, match=f"preprocessor_config.json has {key} "):
        parse_preprocessor({"size": 224, key: value})


@pytest.mark.parametrize(
    ("processor", "unlike"),
    [
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, "crop_pct 0.875"),
        ({"size": 224, "do_resize": False}, "do_resize False"),
        ({"size": 224, "do_pad": True}, "do_pad True"),
    ],
)
def test_setting_that_a_spec_cannot_say_is_named(processor, unlike):
    assert parse_preprocessor(processor).unlike == (unlike,)


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
    recipe = Recipe(model=str(tmp_path)).resolved(multi_label=False)
    model = vit.build(recipe, vit.Classes(("a", "b", "c"), False))
    assert vit.image_spec(model, recipe.model) == CROPPED


def test_fine_tuning_says_what_it_does_not_keep(tmp_path, caplog):
    saved(tmp_path, CROPPED)
    (tmp_path / "iab_vision.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 16}, "crop_pct": 0.9}')
    recipe = Recipe(model=str(tmp_path)).resolved(multi_label=False)
    assert vit.image_spec(vit.build(recipe, vit.Classes(("a", "b"), False)), recipe.model).height == 16
    assert "crop_pct 0.9" in caplog.text


def test_model_spec_reads_back_as_written(tmp_path):
    spec = ModelSpec(("cat", "dog"), "labels", CROPPED, temperature=1.5)
    assert model_files.read_model_spec(saved(tmp_path, CROPPED), "here") == spec


def test_unknown_key_of_ours_is_refused_by_name(tmp_path):
    path = saved(tmp_path, CROPPED) / "iab_vision.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "temprature": 2}))
    with pytest.raises(InputError, match="temprature"):
        model_files.read_model_spec(tmp_path, "here")


@pytest.mark.parametrize("spec", [CROPPED, ImageSpec(height=16, width=24)])
def test_transformers_processor_makes_the_same_pixels(tmp_path, spec):

    (tmp_path / "preprocessor_config.json").write_text(json.dumps(model_files.preprocessor_config(spec)))
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8)).resize(
        (96, 48), 2
    )  # halves of pixels are cut otherwise
    picture.save(tmp_path / "picture.png")
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    expected = processor(picture, return_tensors="np")["pixel_values"]
    pixels_hwc = prepare((tmp_path / "picture.png").read_bytes(), spec).pixels_hwc
    found = normalize(torch.from_numpy(pixels_hwc.copy())[None], spec).numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 0.02
