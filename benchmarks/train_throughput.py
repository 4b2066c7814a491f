"""The training loop against `transformers.Trainer`: same ViT, batch and cores, decoded images in memory.

    python benchmarks/train_throughput.py

Both run in one process with the same number of threads, turn by turn so that a drifting machine hits both,
with the plain recipe that Trainer knows too: AdamW, cosine, clipping, bf16 autocast, no augmentation. About
three minutes on 2 cores. Expected: at least 0.95 of Trainer's samples/s.
"""

import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))
from pipelines.training import model as vit
from pipelines.training.recipe import Loss, Optimizer, Recipe
from tests.builders import training as small_training

CLASSES, IMAGES, BATCH, STEPS, ROUNDS = 17, 1024, 32, 24, 3
RECIPE = Recipe(
    model="scratch:tiny", image_size=64, patch_size=8, epochs=1, batch_size=BATCH, precision="bf16",
    augment=small_training.STILL, loss=Loss(label_smoothing=0),
    optimizer=Optimizer(learning_rate=5e-4, ema_decay=0),
)  # fmt: skip


class Decoded(torch.utils.data.Dataset):
    """The same pixels for Trainer, normalised the same way."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = torch.from_numpy(self.pixels[index]).permute(2, 0, 1).float() / 255
        return {"pixel_values": (image - 0.5) / 0.5, "labels": torch.tensor(self.labels[index])}


def ours(pixels: np.ndarray, labels: np.ndarray) -> float:
    """Samples/s of our loop: from the stored pixels to the optimizer's step."""
    made = small_training.trainer_of(RECIPE, pixels, labels, n_classes=CLASSES)
    started = time.perf_counter()
    for step, batches in itertools.islice(made.batches.iter_steps(0, 0), STEPS):
        made.train_step(batches, epoch=0, step=step)
    return STEPS * BATCH / (time.perf_counter() - started)


def theirs(dataset: Decoded) -> float:
    """Samples/s of transformers.Trainer, by its own clock, which leaves its set-up out."""
    classes = vit.Classes(tuple(map(str, range(CLASSES))), False)
    model = vit.build(RECIPE.resolved(multi_label=False), classes)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=5e-4,
            weight_decay=0.05, lr_scheduler_type="cosine", warmup_steps=0.1, bf16=True, use_cpu=True,
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
            remove_unused_columns=False, optim="adamw_torch_fused", max_grad_norm=1.0,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
        return float(trainer.train().metrics["train_samples_per_second"])


def main() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (IMAGES, 64, 64, 3), dtype=np.uint8)
    labels = random.integers(0, CLASSES, IMAGES)
    theirs(Decoded(pixels, labels))  # oneDNN compiles its kernels at first use
    rates = {"loop": [], "Trainer": []}
    for _ in range(ROUNDS):
        rates["loop"].append(ours(pixels, labels))
        rates["Trainer"].append(theirs(Decoded(pixels, labels)))
    for name, values in rates.items():
        print(f"{name:8} {np.median(values):7.1f} samples/s  ({', '.join(f'{v:.1f}' for v in values)})")
    print(f"ratio    {np.median(rates['loop']) / np.median(rates['Trainer']):.3f}")


if __name__ == "__main__":
    main()
