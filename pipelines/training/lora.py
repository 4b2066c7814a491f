"""LoRA (Hu et al. 2022) through peft: adapters added before training, merged into the weights before saving.

What is saved is the plain architecture: nothing that reads a checkpoint needs peft.
"""

import copy
from typing import Any

from pipelines.messages import InputError, first_line
from pipelines.training import layers
from pipelines.training.recipe import Finetune


def add_adapters(model: Any, finetune: Finetune) -> None:
    """Give the body's linear layers adapters; these and the head are then all that learns.

    Raises:
        InputError: peft finds no layer to adapt.
    """
    from peft import LoraConfig, inject_adapter_in_model

    above = layers.head(model)
    config = LoraConfig(
        r=finetune.lora_r,
        lora_alpha=finetune.lora_alpha,
        lora_dropout=finetune.lora_dropout,
        target_modules=finetune.lora_target_modules,
        exclude_modules=sorted({name.rpartition(".")[0] for name in above}),
    )
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:  # no such module, or one of a kind that peft does not adapt
        raise InputError(
            f"lora_target_modules is {finetune.lora_target_modules}: {first_line(error)}"
        ) from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in above or parameter.requires_grad)


def merge_adapters(model: Any) -> Any:
    """The model with its adapters merged into the weights: a copy, or itself where it has none."""
    if not hasattr(model, "peft_config"):
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = copy.deepcopy(model)
    for name, module in list(merged.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            merged.set_submodule(name, module.get_base_layer())
    return merged
