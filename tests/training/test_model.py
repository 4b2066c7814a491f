"""Models are built, frozen, decayed, resized and dropped as the recipe says."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification, Dinov2Config, Dinov2ForImageClassification

from pipelines.messages import InputError
from pipelines.specs import ImageSpec, ModelSpec
from pipelines.training import layers, model_files
from pipelines.training import model as vit
from pipelines.training.recipe import Finetune, Optimizer, Recipe
from tests.builders.training import RECIPE, trained, trainer

CLASSES = vit.Classes(("483", "1", "v9i3On"), False)
DEEP = replace(RECIPE, layers=3)
LABELS = [[i % 3] for i in range(48)]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def local_model(tmp_path):
    """A saved model of two classes with its own normalisation."""
    model = vit.build(DEEP, vit.Classes(("cat", "dog"), False))
    spec = ImageSpec(height=16, width=16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    model_files.write_model(model, tmp_path, ModelSpec(("cat", "dog"), "labels", spec))
    return tmp_path, model


@pytest.mark.parametrize(
    ("network", "learning"),
    [
        (Finetune(freeze="backbone"), {"head"}),
        (Finetune(freeze_blocks=2), {"2", "norm", "head"}),
        (Finetune(), {"embeddings", "0", "1", "2", "norm", "head"}),
    ],
)
def test_frozen_weights_are_bit_equal_after_training(network, learning):
    made = trainer(replace(DEEP, finetune=network, epochs=1), LABELS)
    before = weights(made.model)
    trained(made, 1)
    changed = {
        part_of(name)
        for name, value in made.model.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed == learning


def part_of(name: str) -> str:
    if "layers." in name:
        return name.split("layers.")[1].split(".", maxsplit=1)[0]
    return next((part for part in ("embeddings", "norm") if part in name), "head")


def test_gradual_unfreezing_thaws_one_block_at_a_time_from_the_top():
    network = Finetune(freeze="backbone", unfreeze_every_epochs=2)
    lowest = [layers.first_trained_depth(network, 3, epoch) for epoch in range(9)]
    assert lowest == [4, 4, 3, 3, 2, 2, 1, 1, 0]
    model = vit.build(DEEP, CLASSES)
    assert (
        layers.freeze(model, network, 0)
        and not layers.freeze(model, network, 1)
        and layers.freeze(model, network, 2)
    )


def test_layer_decay_gives_each_block_the_stated_rate():
    model = vit.build(DEEP, CLASSES)
    groups = layers.parameter_groups(model, Optimizer(learning_rate=1, layer_decay=0.5, weight_decay=0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rate = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert rate["classifier.weight"] == 1
    assert rate["vit.layernorm.weight"] == 1
    assert [rate[f"vit.layers.{i}.mlp.fc1.weight"] for i in range(3)] == [0.125, 0.25, 0.5]
    assert rate["vit.embeddings.position_embeddings"] == 0.0625


def test_the_head_learns_at_a_rate_of_its_own():
    model = vit.build(DEEP, CLASSES)
    groups = layers.parameter_groups(model, Optimizer(learning_rate=1, layer_decay=0.5, head_lr_factor=10))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rate = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert rate["classifier.weight"] == rate["classifier.bias"] == 10
    assert (rate["vit.layernorm.weight"], rate["vit.layers.2.mlp.fc1.weight"]) == (1, 0.5)


def test_biases_norms_and_positions_are_not_decayed():
    model = vit.build(DEEP, CLASSES)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = layers.parameter_groups(model, Optimizer(learning_rate=1))
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_a_pretrained_model_gets_a_new_head_and_keeps_its_body_and_normalisation(local_model):
    folder, original = local_model
    recipe = Recipe(model=str(folder)).resolved(multi_label=False)
    model = vit.build(recipe, CLASSES)
    assert torch.equal(model.vit.layers[1].mlp.fc1.weight, original.vit.layers[1].mlp.fc1.weight)
    assert model.classifier.weight.shape == (3, 192)
    assert model.config.id2label == {0: "483", 1: "1", 2: "v9i3On"}
    spec = vit.image_spec(recipe)
    assert (spec.height, spec.mean, spec.std) == (16, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


def test_as_many_other_classes_still_get_a_new_head(local_model):
    folder, original = local_model
    recipe = Recipe(model=str(folder)).resolved(multi_label=False)
    other = vit.build(recipe, vit.Classes(("car", "boat"), False))
    same = vit.build(recipe, vit.Classes(("cat", "dog"), False))
    assert not torch.equal(other.classifier.weight, original.classifier.weight)
    assert torch.equal(same.classifier.weight, original.classifier.weight)


def test_positions_are_interpolated_for_another_image_size(local_model):
    folder, original = local_model
    model = vit.build(Recipe(model=str(folder), image_size=32).resolved(multi_label=False), CLASSES)
    assert model(pixel_values=torch.zeros(1, 3, 32, 32)).logits.shape == (1, 3)
    positions = model.vit.embeddings.position_embeddings
    assert positions.shape == (1, 17, 192)
    mean = original.vit.embeddings.position_embeddings[:, 1:].mean()
    assert positions[:, 1:].mean().item() == pytest.approx(mean.item(), abs=1e-3)


def test_the_saved_model_opens_with_plain_transformers_and_answers_the_same(local_model):
    folder, original = local_model
    images = torch.randn(2, 3, 16, 16)
    opened = AutoModelForImageClassification.from_pretrained(folder)
    torch.testing.assert_close(opened(images).logits, original.eval()(images).logits)
    spec = model_files.read_model_spec(folder, str(folder))
    assert spec.class_ids == ("cat", "dog") and spec.image_spec.std == (0.2, 0.3, 0.4)


def test_drop_path_acts_in_training_only_and_keeps_the_mean():
    still = vit.build(RECIPE, CLASSES)
    model = vit.build(replace(RECIPE, finetune=Finetune(drop_path=0.5)), CLASSES)
    images = torch.randn(64, 3, 16, 16)
    model.eval(), still.eval()
    torch.testing.assert_close(model(images).logits, still(images).logits)
    model.train()
    assert not torch.equal(model(images).logits, model(images).logits)
    dropped = layers.drop_branches(0.25)(model, (), torch.ones(20_000, 1))
    assert dropped.unique().tolist() == [0, pytest.approx(4 / 3)]
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)


def test_another_architecture_can_be_fine_tuned_and_decayed(tmp_path):
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14, num_labels=2
    )
    Dinov2ForImageClassification(config).save_pretrained(tmp_path)
    model = vit.build(Recipe(model=str(tmp_path)).resolved(multi_label=False), CLASSES)
    groups = layers.parameter_groups(model, Optimizer(learning_rate=1, layer_decay=0.5))
    assert {group["lr"] for group in groups} == {1, 0.5, 0.25, 0.125, 0.0625}
    layers.freeze(model, Finetune(freeze="backbone"), 0)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "scratch:huge"}, "scratch:tiny"),
        ({"model": "scratch:tiny", "image_size": 20, "patch_size": 8}, "multiple of patch_size 8"),
        ({"model": "/no/such/folder"}, "/no/such/folder"),
    ],
)
def test_impossible_models_are_refused_with_the_remedy(settings, words):
    with pytest.raises(InputError, match=words):
        vit.build(Recipe(**settings).resolved(multi_label=False), CLASSES)


def test_scratch_positions_distinguish_rows_and_columns():
    positions = vit.sine_positions(4, 16).numpy()
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=2)
    assert (distances[~np.eye(16, dtype=bool)] > 0.1).all()
