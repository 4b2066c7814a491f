"""LoRA: only adapters and head learn, and what is saved is the plain model with the adapters merged in."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray.train
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from export import convert
from export.checkpoint import read_checkpoint
from pipelines.bundle.session import OnnxModel
from pipelines.bundle.settings import RuntimeSpec
from pipelines.messages import InputError
from pipelines.specs import ImageSpec, ModelSpec
from pipelines.training import layers, lora, model_files
from pipelines.training import model as vit
from pipelines.training.recipe import Finetune, Optimizer, Recipe
from tests.builders.training import RECIPE, trained, trainer

LABELS = [[i % 3] for i in range(64)]
CLASSES = ("a", "b", "c")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A pretrained model of two other classes and 16 pixels, with adapters that drop out."""
    spec = ModelSpec(("cat", "dog"), "labels", ImageSpec(height=16, width=16))
    model = vit.build(RECIPE.resolved(multi_label=False), vit.Classes(spec.class_ids, False))
    (tmp_path / "base").mkdir()
    model_files.write_model(model, tmp_path / "base", spec)
    return replace(
        RECIPE,
        model=str(tmp_path / "base"),
        patch_size=None,
        layers=None,
        finetune=Finetune(lora_r=4, lora_dropout=0.1, drop_path=0.1),
        optimizer=Optimizer(learning_rate=1e-2, ema_decay=0.9),
    )


def saved(made, folder: Path, monkeypatch) -> Path:
    """The model's files as a checkpoint of this trainer holds them."""

    def keep(line, checkpoint) -> None:
        checkpoint.to_directory(folder)

    monkeypatch.setattr(ray.train, "report", keep)
    made.report({"score": 1.0}, model=made.model)
    return folder / "model"


def test_a_step_trains_adapters_and_head_alone(recipe):
    made = trainer(recipe, LABELS)
    before = {name: value.clone() for name, value in made.model.named_parameters()}
    trained(made, 1)
    moved = {name for name, value in made.model.named_parameters() if not torch.equal(value, before[name])}
    adapters = {name for name in before if "lora_" in name}
    assert moved == adapters | layers.head(made.model)
    assert len(adapters) == 2 * 2 * 6, "both factors of six linear layers in each of two blocks"


def test_the_saved_model_is_plain_and_exports_with_the_trained_answers(recipe, tmp_path, monkeypatch):
    made = trained(trainer(recipe, LABELS), 1)
    best = saved(made, tmp_path / "checkpoint", monkeypatch)
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it is an error from here on
    base = load_file(Path(recipe.model, "model.safetensors"))
    assert load_file(best / "model.safetensors").keys() == base.keys()
    pixels_nhwc = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    images = (torch.from_numpy(pixels_nhwc).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.inference_mode():
        answers = made.model.eval()(pixel_values=images).logits
        opened = AutoModelForImageClassification.from_pretrained(best)(pixel_values=images).logits
    torch.testing.assert_close(opened, answers, atol=1e-5, rtol=1e-4)
    found = read_checkpoint(best, "best")
    graph = convert.convert(found.network(), found.spec, convert.metadata_of(found, precision="fp32"))
    logits_nc, _ = OnnxModel(graph, RuntimeSpec()).run(pixels_nhwc)
    np.testing.assert_allclose(logits_nc, answers.numpy(), atol=1e-4)


def test_a_continued_run_is_bit_equal_to_an_unbroken_one(recipe):
    unbroken = trained(trainer(recipe, LABELS), 2)
    first = trained(trainer(recipe, LABELS), 1)
    second = trainer(recipe, LABELS)
    second.restore(first.state())
    second.train_epoch()
    for name, value in unbroken.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name
    averaged = [lora.merge_adapters(made.learner.ema.module) for made in (unbroken, second)]
    assert torch.equal(averaged[0].classifier.weight, averaged[1].classifier.weight)


def test_layers_are_chosen_by_name_and_first_blocks_may_stay_without(recipe):
    finetune = Finetune(lora_r=2, lora_target_modules=r".*\.(q|v)_proj", freeze_blocks=1)
    made = trained(trainer(replace(recipe, finetune=finetune), LABELS), 1)
    adapted = {name.split(".lora_")[0] for name, _ in made.model.named_parameters() if ".lora_" in name}
    assert {name.rpartition(".")[2] for name in adapted} == {"q_proj", "v_proj"}
    learn = {name for name, p in made.model.named_parameters() if p.requires_grad and "lora_" in name}
    assert learn and all(".layers.1." in name for name in learn)


def test_what_adapters_cannot_do_is_refused(recipe):
    finetune = Finetune(lora_r=2, lora_target_modules="no_such_layer")
    with pytest.raises(InputError, match=r"lora_target_modules is no_such_layer"):
        vit.build(replace(recipe, finetune=finetune), vit.Classes(CLASSES, False))
    with pytest.raises(ValueError, match="freeze backbone"):
        Finetune(lora_r=2, freeze="backbone")
    with pytest.raises(ValueError, match="pretrained"):
        replace(RECIPE, finetune=Finetune(lora_r=2))
    assert replace(recipe, optimizer=Optimizer()).resolved(multi_label=False).optimizer.peak == 1e-3
