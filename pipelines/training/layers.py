"""The parts of an image classifier: its blocks, its head, and which of its weights learn and how fast.

Parts are found by structure, so freezing and layer decay need no list of architectures.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pipelines.messages import InputError
from pipelines.specs import ImageSpec
from pipelines.training.recipe import Finetune, Optimizer

UNDECAYED = ("position_embedding", "relative_position_bias", "class_embedding", "_token")
"""Parts of the names of learned positions and tokens, which get no weight decay."""
OWN_SETTING = "drop_path_rate"
"""Name in the config of an architecture that has stochastic depth of its own."""


def blocks(model: Any) -> list[nn.Module]:
    """The blocks of the body, first to last, through all stages of a pyramid.

    Raises:
        InputError: the model has no list of modules.
    """
    outer = _largest_list(model)
    if outer is None:
        raise InputError(f"this {model.config.model_type} model has no list of blocks to freeze or decay")
    return [block for stage in outer for block in _blocks_of(stage)]


def _blocks_of(stage: nn.Module) -> list[nn.Module]:
    """The blocks of a stage, when most of it is a list of them; else it is a block itself."""
    inner = _largest_list(stage)
    if inner is None or 2 * _n_weights(inner) <= _n_weights(stage):
        return [stage]
    return [block for part in inner for block in _blocks_of(part)]


def _largest_list(module: nn.Module) -> nn.ModuleList | None:
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    return max(lists, key=_n_weights, default=None)  # the outer one of a nest: `max` takes the first


def _n_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def head(model: Any) -> frozenset[str]:
    """Names of the head's parameters: all that is outside the module that holds the blocks.

    Raises:
        InputError: that leaves no head, or nothing but one.
    """
    first = {id(parameter) for parameter in blocks(model)[0].parameters()}
    body = [
        name
        for name, child in model.named_children()
        if first & {id(parameter) for parameter in child.parameters()}
    ]
    names = [name for name, _ in model.named_parameters()]
    found = frozenset(name for name in names if name.split(".", maxsplit=1)[0] not in body)
    if not 0 < len(found) < len(names):
        raise InputError(
            f"{type(model).__name__} keeps body and head in {', '.join(body)}, where they cannot be told "
            "apart; use a model of transformers' own with a classifier outside its body"
        )
    return found


def depths(model: Any) -> dict[str, int]:
    """Depth of each parameter: 0 embeddings, 1 to L the blocks, L + 1 what follows (BEiT's numbering).

    What is between two blocks, such as a pyramid's down-sampling, belongs to the lower one.
    """
    found, above = blocks(model), head(model)
    owner = {id(parameter): i + 1 for i, block in enumerate(found) for parameter in block.parameters()}
    depth, reached = {}, 0
    for name, parameter in model.named_parameters():
        reached = owner.get(id(parameter), reached)
        follows = name in above or (reached == len(found) and id(parameter) not in owner)
        depth[name] = len(found) + 1 if follows else reached
    return depth


def first_trained_depth(finetune: Finetune, n_blocks: int, epoch: int) -> int:
    """The lowest depth that learns in this epoch (0-based): everything from there up to the head."""
    lowest = finetune.freeze_blocks + 1 if finetune.freeze_blocks else 0
    if finetune.freeze == "none":
        return lowest
    thawed = epoch // finetune.unfreeze_every_epochs if finetune.unfreeze_every_epochs else 0
    return max(lowest, n_blocks + 1 - thawed)


def refuse_freezing(model: Any, finetune: Finetune) -> None:
    """Raise InputError when more blocks are to be frozen than the model has."""
    n_blocks = len(blocks(model))
    if finetune.freeze_blocks > n_blocks:
        raise InputError(
            f"freeze_blocks is {finetune.freeze_blocks}, but the model has {n_blocks} blocks; "
            "give at most that many, or set freeze to backbone to train the head alone"
        )


def freeze(model: Any, finetune: Finetune, epoch: int, *, unused: frozenset[str] = frozenset()) -> bool:
    """Let exactly the weights learn that this epoch trains; True when that changed something.

    With `backbone` frozen and nothing thawed, only the head itself learns, not the backbone's last norm.

    Args:
        unused: names of parameters that never get a gradient; they count as frozen.
    """
    n_blocks, above, depth = len(blocks(model)), head(model), depths(model)
    lowest = first_trained_depth(finetune, n_blocks, epoch)
    head_only = finetune.freeze == "backbone" and lowest == n_blocks + 1
    changed = False
    for name, parameter in model.named_parameters():
        learns = (name in above if head_only else depth[name] >= lowest) and name not in unused
        changed |= parameter.requires_grad != learns
        parameter.requires_grad_(learns)
    return changed


def find_unused_parameters(model: Any, spec: ImageSpec) -> frozenset[str]:
    """Names of parameters that get no gradient: those that LoRA leaves as they are, and those that do not
    reach the logits, such as DINOv2's mask token or CLIP's last norm.

    DistributedDataParallel would wait for their gradients forever.
    """
    model.eval()
    device = next(model.parameters()).device
    model(pixel_values=torch.zeros(1, 3, spec.height, spec.width, device=device)).logits.sum().backward()
    found = frozenset(name for name, parameter in model.named_parameters() if parameter.grad is None)
    model.zero_grad(set_to_none=True)
    return found


def set_training(model: Any) -> None:
    """Training mode, but for frozen batch norms, whose running statistics would go on changing."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(
            parameter.requires_grad for parameter in module.parameters()
        ):
            module.eval()


def parameter_groups(model: Any, optimizer: Optimizer) -> list[dict[str, Any]]:
    """AdamW groups: rates by depth and of the head; no weight decay on biases, norms, tokens and positions.

    The optimizer's settings are those of a resolved recipe.
    """
    top = len(blocks(model)) + 1
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    depth, above = depths(model), head(model)
    for name, parameter in model.named_parameters():
        decays = parameter.ndim > 1 and not any(part in name for part in UNDECAYED)
        factor = optimizer.layer_decay ** (top - depth[name])
        rate = optimizer.peak * factor * (optimizer.head_lr_factor if name in above else 1)
        weight_decay = optimizer.weight_decay if decays else 0.0
        group = groups.setdefault((rate, decays), {"params": [], "weight_decay": weight_decay, "lr": rate})
        group["params"].append(parameter)
    return list(groups.values())


def drop_path_setting(config: Any, rate: float) -> dict[str, float]:
    """What to set in a model's config so that its own stochastic depth, if any, has this rate."""
    return {OWN_SETTING: rate} if hasattr(config, OWN_SETTING) else {}


def add_drop_path(model: Any, rate: float) -> None:
    """Drop the branches of every block of a model that does not do so itself.

    Raises:
        InputError: the blocks do not show their two branches.
    """
    if not rate or hasattr(model.config, OWN_SETTING):
        return
    found = blocks(model)
    for i, block in enumerate(found):
        for branch in _residual_branches(block):
            branch.register_forward_hook(drop_branches(rate * (i + 1) / len(found)))


def _residual_branches(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """What a Transformer block adds to its input: attention, then the feed-forward network."""
    attention = getattr(block, "attention", None) or getattr(block, "self_attn", None)
    mlp = getattr(block, "mlp", None)
    if not isinstance(attention, nn.Module) or not isinstance(mlp, nn.Module):
        raise InputError(
            f"drop_path needs blocks of `attention` and `mlp`, not {type(block).__name__}; set it to 0"
        )
    return attention, mlp


def drop_branches(rate: float) -> Any:
    """A forward hook that zeroes a branch's output for a random share of the images and scales the others."""

    def drop(module: nn.Module, _inputs: Sequence[Any], output: Any) -> Any:
        if not module.training:
            return output
        branch = output[0] if isinstance(output, tuple) else output
        kept = torch.rand(len(branch), *[1] * (branch.ndim - 1), device=branch.device) >= rate
        branch = branch * (kept / max(1 - rate, 1e-6)).to(branch.dtype)
        return (branch, *output[1:]) if isinstance(output, tuple) else branch

    return drop
