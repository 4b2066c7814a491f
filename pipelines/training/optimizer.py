"""A model with what trains it: AdamW, its schedule, clipping, loss scaling and averaged weights."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim import swa_utils
from torch.optim.lr_scheduler import LambdaLR

from pipelines.specs import ImageSpec
from pipelines.training import layers
from pipelines.training.recipe import Optimizer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Learner:
    """A model, its optimizer, schedule, loss scaler and averaged weights: all that a checkpoint restores."""

    def __init__(self, model: Any, settings: Optimizer, *, total_steps: int, precision: str) -> None:
        self.model = model
        self.max_grad_norm = settings.max_grad_norm
        self.optimizer = torch.optim.AdamW(
            layers.parameter_groups(model, settings),
            lr=settings.peak,
            betas=(0.9, settings.adam_beta2),
            fused=True,
        )
        self.scheduler = LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(settings, step, total_steps)
        )
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=precision == "fp16")
        self.ema = build_ema(model, settings.ema_decay) if settings.ema_decay else None

    @property
    def learning_rate(self) -> float:
        """The largest rate of a layer in the next step, which is the head's unless that is slowed down."""
        return float(max(self.scheduler.get_last_lr()))

    def step(self) -> torch.Tensor:
        """Clip and apply the gradients that have accumulated; returns their norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        limit = self.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update_parameters(self.model)
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        parts = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "ema": self.ema,
        }
        return {name: part for name, part in parts.items() if part is not None}


def learning_rate_factor(settings: Optimizer, step: int, total_steps: int) -> float:
    """Factor of the peak learning rate at this step (0-based): linear warm-up, then the schedule."""
    warmup = settings.warmup_steps * total_steps if settings.warmup_steps < 1 else settings.warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min((step - warmup) / max(total_steps - warmup, 1), 1)
    if settings.lr_scheduler_type == "constant":
        return 1.0
    shape = 0.5 * (1 + math.cos(math.pi * done)) if settings.lr_scheduler_type == "cosine" else 1 - done
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * shape


def build_ema(model: torch.nn.Module, decay: float) -> swa_utils.AveragedModel:
    """Exponential moving average of the weights, with a decay of min(decay, (1 + t) / (10 + t)) at step t.

    It starts from the model's initial weights: torch would copy those of the first step.
    """

    def average(averaged: Any, current: Any, step: torch.Tensor) -> None:
        ramped = min(decay, (1 + int(step)) / (10 + int(step)))
        swa_utils.get_ema_multi_avg_fn(ramped)(averaged, current, step)

    ema = swa_utils.AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    ema.n_averaged.fill_(1)
    return ema


def choose_precision(precision: str, device: torch.device) -> str:
    """What `auto` means here: bf16 where the device computes in it, else fp16 (GPU) or fp32 (CPU)."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if _has_bf16_instructions() else "fp32"


def _has_bf16_instructions() -> bool:
    """Whether this CPU multiplies bf16 itself: then training is 2.1 times faster, emulated it is slower."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@contextlib.contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Matrix products in this number format; fp32 leaves everything as it is."""
    with torch.autocast(device.type, DTYPES.get(precision), enabled=precision in DTYPES):
        yield


def fits_in_memory(model: Any, n_images: int, spec: ImageSpec, *, precision: str) -> bool:
    """Whether a step over so many images has room on the model's device, AdamW's state included.

    A forward and a backward pass of black images, which leaves the model as it was.
    """
    before = [buffer.clone() for buffer in model.buffers()]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = learning[0].device
    try:
        state = [torch.empty_like(parameter) for parameter in learning for _ in range(2)]
        images = torch.zeros(n_images, 3, spec.height, spec.width, device=device)
        with autocast(device, precision):
            logits = model(pixel_values=images).logits
        logits.float().sum().backward()
        del state
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
    return True
