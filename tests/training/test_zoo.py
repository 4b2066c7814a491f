"""Every kind of image classifier that users bring is fine-tuned: new head, frozen body, no idle weight.

Tiny models with random weights, saved and loaded again as a user's folder is.
"""

import json
from dataclasses import replace

import pytest
import torch
import transformers

from pipelines.messages import InputError
from pipelines.training import layers, lora
from pipelines.training.model import Classes, build, image_spec
from pipelines.training.recipe import Finetune, Optimizer, Recipe

ENCODER = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8, "intermediate_size": 40,
}  # fmt: skip
ZOO = {
    "ViT": ENCODER,
    "DeiT": ENCODER,
    "Beit": ENCODER,
    "Dinov2": {**ENCODER, "mlp_ratio": 2},
    "Siglip": {"vision_config": ENCODER},
    "CLIP": {"vision_config": ENCODER},
    "Swin": {
        "embed_dim": 12, "depths": [2, 1], "num_heads": [2, 4],
        "window_size": 4, "image_size": 32, "patch_size": 4,
    },
    "ConvNext": {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 2, 1], "image_size": 32},
    "ResNet": {
        "embedding_size": 8, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 2, 1], "layer_type": "basic",
    },
}  # fmt: skip
N_BLOCKS = {"Swin": 3, "ConvNext": 5, "ResNet": 4}
CLASSES = Classes(("483", "1", "v9i3On"), False)


@pytest.fixture(params=ZOO)
def folder(request, tmp_path_factory):
    """A saved classifier of two other classes; ResNet's size is said by its preprocessor alone."""
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    config = getattr(transformers, f"{request.param}Config")(num_labels=2, **ZOO[request.param])
    getattr(transformers, f"{request.param}ForImageClassification")(config).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(
        json.dumps({"size": 32, "crop_size": 32, "do_center_crop": True})
    )
    return path


def built(folder, **network):
    recipe = Recipe(model=str(folder), finetune=Finetune(**network)).resolved(multi_label=False)
    return build(recipe, CLASSES), image_spec(recipe)


def step(model, spec) -> None:
    """One optimiser step as the training loop takes it."""
    layers.set_training(model)
    adam = torch.optim.AdamW(layers.parameter_groups(model, Optimizer(learning_rate=1e-2)))
    images = torch.randn(4, 3, spec.height, spec.width)
    logits = model(pixel_values=images).logits
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, "DistributedDataParallel would wait for these forever"
    adam.step()


def learned(model, spec, finetune: Finetune) -> set[str]:
    """What a step changes of a model that is frozen as `finetune` says: parameters and statistics."""
    layers.freeze(model, finetune, 0, unused=layers.find_unused_parameters(model, spec))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step(model, spec)
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def test_a_saved_classifier_gets_a_new_head_and_every_trained_weight_a_gradient(folder):
    model, spec = built(folder)
    original = transformers.AutoModelForImageClassification.from_pretrained(folder).state_dict()
    head = layers.head(model)
    assert {
        name for name, value in model.state_dict().items() if not torch.equal(value, original[name])
    } == head
    assert model(pixel_values=torch.zeros(1, 3, spec.height, spec.width)).logits.shape == (1, 3)
    assert (spec.height, spec.width) == (32, 32)
    name = folder.name.rstrip("0123456789")
    assert len(layers.blocks(model)) == N_BLOCKS.get(name, 2)
    layers.freeze(model, Finetune(), 0, unused=layers.find_unused_parameters(model, spec))
    before = {name: value.clone() for name, value in model.named_parameters()}
    step(model, spec)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved >= head and len(moved) > len(before) / 2


def test_a_frozen_body_stays_bit_equal_with_its_running_statistics(folder):
    model, spec = built(folder, freeze="backbone")
    assert learned(model, spec, Finetune(freeze="backbone")) == layers.head(model)


def test_adapters_and_the_head_learn_on_a_body_that_stays_and_merge_into_the_plain_architecture(folder):
    if folder.name.startswith("ResNet"):
        with pytest.raises(InputError, match="lora_target_modules is all-linear"):
            built(folder, lora_r=2)
        return
    model, spec = built(folder, lora_r=2)
    changed = learned(model, spec, Finetune(lora_r=2))
    assert changed >= layers.head(model)
    adapters = changed - layers.head(model)
    assert adapters and all("lora_" in name for name in adapters)
    merged, images = lora.merge_adapters(model), torch.randn(2, 3, spec.height, spec.width)
    assert merged.state_dict().keys() == built(folder)[0].state_dict().keys()
    expected = model.eval()(pixel_values=images).logits
    torch.testing.assert_close(merged.eval()(pixel_values=images).logits, expected, atol=1e-5, rtol=1e-4)


def test_depths_rise_from_the_embeddings_to_the_head(folder):
    model, _ = built(folder)
    depths = list(layers.depths(model).values())
    assert depths == sorted(depths) and set(depths) == set(range(len(layers.blocks(model)) + 2))


def test_stochastic_depth_acts_in_training_or_is_refused(folder):
    if folder.name.startswith("ResNet"):
        with pytest.raises(InputError, match="drop_path needs blocks"):
            built(folder, drop_path=0.9)
        return
    model, spec = built(folder, drop_path=0.9)
    images = torch.randn(2, 3, spec.height, spec.width)
    model.train()
    assert not torch.equal(model(pixel_values=images).logits, model(pixel_values=images).logits)
    still, _ = built(folder)
    model.load_state_dict(still.state_dict())
    still.train(), model.eval()
    assert torch.equal(model(pixel_values=images).logits, still(pixel_values=images).logits)


def test_a_size_that_nothing_states_is_asked_for_and_a_convolutional_network_takes_any(tmp_path):
    config = transformers.ResNetConfig(num_labels=2, **ZOO["ResNet"])
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="--image-size"):
        built(tmp_path)
    assert image_spec(Recipe(model=str(tmp_path), image_size=48)).height == 48


def test_a_model_whose_head_cannot_be_told_from_its_body_is_refused():
    class Wrapper(torch.nn.Module):
        def __init__(self, model) -> None:
            super().__init__()
            self.inner = model

    model = build(Recipe(model="scratch:tiny", image_size=16, patch_size=8, layers=1), CLASSES)
    with pytest.raises(InputError, match="cannot be told"):
        layers.head(Wrapper(model))


def test_more_frozen_blocks_than_there_are_is_refused():
    recipe = Recipe(model="scratch:tiny", image_size=16, patch_size=8, layers=2)
    with pytest.raises(InputError, match=r"freeze_blocks is 3.*has 2 blocks"):
        build(replace(recipe, finetune=Finetune(freeze_blocks=3)).resolved(multi_label=False), CLASSES)


@pytest.mark.parametrize("name", ["Swin", "Beit"])
def test_relative_position_tables_are_not_decayed(name):
    settings = {**ZOO[name], **({"use_relative_position_bias": True} if name == "Beit" else {})}
    config = getattr(transformers, f"{name}Config")(num_labels=2, **settings)
    model = getattr(transformers, f"{name}ForImageClassification")(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = layers.parameter_groups(model, Optimizer(learning_rate=1))
    decayed = [names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]]
    assert decayed and not [name for name in decayed if "relative_position" in name]


def test_a_distilled_model_takes_another_size(tmp_path):
    """Two tokens before the patches: class and distillation."""
    config = transformers.DeiTConfig(num_labels=2, **ZOO["DeiT"])
    original = transformers.DeiTForImageClassification(config)
    original.save_pretrained(tmp_path)
    model = build(Recipe(model=str(tmp_path), image_size=48).resolved(multi_label=False), CLASSES)
    positions = model.deit.embeddings.position_embeddings
    assert positions.shape == (1, 2 + 36, 24)
    assert torch.equal(positions[:, :2], original.deit.embeddings.position_embeddings[:, :2])
    assert model(pixel_values=torch.zeros(1, 3, 48, 48)).logits.shape == (1, 3)


def test_a_folder_without_preprocessor_is_announced(tmp_path, caplog):
    config = transformers.ViTConfig(num_labels=2, **ENCODER)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    with caplog.at_level("WARNING"):
        built(tmp_path)
    assert "no preprocessor_config.json" in caplog.text
