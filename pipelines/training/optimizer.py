"""The arithmetic of one optimiser step: learning rate, clipping, averaged weights, number formats."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from pipelines.training.recipe import Optimizer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def learning_rate_share(optimizer: Optimizer, step: int, total_steps: int) -> float:
    """Share of the peak learning rate at this step (0-based): linear warm-up, then the schedule."""
    warmup = optimizer.warmup * total_steps if optimizer.warmup < 1 else optimizer.warmup
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(total_steps - warmup, 1)
    shape = {
        "cosine": 0.5 * (1 + math.cos(math.pi * min(progress, 1))),
        "linear": 1 - min(progress, 1),
        "constant": 1.0,
    }[optimizer.schedule]
    floor = 0.0 if optimizer.schedule == "constant" else optimizer.final_share
    return floor + (1 - floor) * shape


def adamw(groups: list[dict[str, Any]], optimizer: Optimizer) -> torch.optim.AdamW:
    """Fused AdamW over parameter groups; `set_learning_rate` gives each its rate before every step."""
    return torch.optim.AdamW(groups, lr=optimizer.learning_rate, betas=(0.9, optimizer.beta2), fused=True)


def set_learning_rate(adam: torch.optim.Optimizer, rate: float) -> None:
    """The rate of this step, scaled by each group's depth."""
    for group in adam.param_groups:
        group["lr"] = rate * group["scale"]


def chosen_precision(precision: str, device: torch.device) -> str:
    """What `auto` means here: bf16 where the device computes in it, else fp16 (GPU) or fp32 (CPU)."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if has_bf16_instructions() else "fp32"


def has_bf16_instructions() -> bool:
    """Whether this CPU multiplies bf16 itself: then training is 2.1 times faster, emulated it is slower."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@contextlib.contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Matrix products in this number format; fp32 leaves everything as it is."""
    with torch.autocast(device.type, DTYPES.get(precision), enabled=precision in DTYPES):
        yield


class Averaged:
    """Exponential moving average of a model's weights, in float32, ramped up over the first steps."""

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}

    @torch.no_grad()  # type: ignore[untyped-decorator, unused-ignore]
    def update(self, model: torch.nn.Module) -> None:
        """Move towards the model's weights by 1 - decay; early on with min(decay, (1 + t) / (10 + t))."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        current = model.state_dict()
        floating = [name for name, weight in self.weights.items() if weight.is_floating_point()]
        torch._foreach_lerp_(
            [self.weights[name] for name in floating], [current[name] for name in floating], 1 - decay
        )

    @contextlib.contextmanager
    def applied(self, model: torch.nn.Module) -> Iterator[None]:
        """The model with the averaged weights, for the duration."""
        own = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
        model.load_state_dict(self.weights)
        try:
            yield
        finally:
            model.load_state_dict(own)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.weights = state["weights"]
