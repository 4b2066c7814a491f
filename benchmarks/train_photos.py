"""What training on the real photos reaches: the recipe from random weights, and transfer between classes.

    python benchmarks/train_photos.py --photos photos/labels.csv --part recipe
    python benchmarks/train_photos.py --photos photos/labels.csv --part transfer

`recipe` runs jobs/configs/train_photos_scratch.yaml and prints the test split's numbers (expected: top-1
0.59, top-3 0.80, balanced accuracy 0.57, calibration error below 0.05). `transfer` trains on 12 of the 18
classes, then fine-tunes on the other 6 with the same few epochs: from random weights, the head alone, all
layers, and all layers with layer-wise decay. Every run is the command that a user would give.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("accuracy", "accuracy@3", "balanced_accuracy", "ece")
MODEL = ("--image-size", "64")
SCRATCH = ("--model", "scratch:tiny", "--patch-size", "8", *MODEL)
SHORT = ("--augment.repeats", "1", "--epochs", "6")
KEPT_BACK = ("483", "596", "210", "274", "530", "27")
"""Classes to transfer to: sports, technology, food, homes, sailing, motorcycles."""


def train(output: Path, *settings: str) -> dict[str, float]:
    """One run of the command; the test split's numbers and the seconds it took."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "jobs", "train", "--output", str(output), *settings]
    subprocess.run(command, cwd=ROOT, check=True)
    content = json.loads((output / "run.json").read_text())
    return {**{name: content["test"][name] for name in SHOWN if name in content["test"]},
            "seconds": time.perf_counter() - started}  # fmt: skip


def label_map(folder: Path, labels: set[str], kept: set[str]) -> Path:
    """A table that drops every label but the kept ones."""
    path = folder / f"keep-{len(kept)}.csv"
    rows = [(label, label if label in kept else "") for label in sorted(labels)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("label", "target"), *rows])
    return path


def recipe(photos: Path, output: Path) -> dict[str, dict[str, float]]:
    config = ROOT / "jobs/configs/train_photos_scratch.yaml"
    return {"recipe": train(output / "recipe", "--dataset", str(photos), "--config", str(config))}


def transfer(photos: Path, output: Path) -> dict[str, dict[str, float]]:
    with photos.open() as file:
        labels = {row["label"] for row in csv.DictReader(file)}
    before = label_map(output, labels, labels - set(KEPT_BACK))
    after = label_map(output, labels, set(KEPT_BACK))
    common = ("--dataset", str(photos), "--num-workers", "2")
    found = {
        "pretraining on 12 classes": train(
            output / "pretrained", *common, "--label-map", str(before), *SCRATCH, *SHORT
        )
    }
    pretrained = ("--model", str(output / "pretrained" / "best"), *MODEL)
    ways = {
        "6 classes, from random weights": SCRATCH,
        "6 classes, head alone": (
            *pretrained, "--finetune.freeze", "backbone", "--optimizer.learning-rate", "2e-3",
        ),
        "6 classes, all layers": (*pretrained, "--optimizer.learning-rate", "3e-4"),
        "6 classes, layer decay 0.75": (
            *pretrained, "--optimizer.learning-rate", "3e-4", "--optimizer.layer-decay", "0.75",
        ),
    }  # fmt: skip
    for number, (name, settings) in enumerate(ways.items()):
        found[name] = train(
            output / f"transfer-{number}", *common, "--label-map", str(after), *settings, *SHORT
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=["recipe", "transfer"], required=True)
    parser.add_argument("--photos", type=Path, required=True, help="labels.csv of the photographs")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "train_photos")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    run = {"recipe": recipe, "transfer": transfer}[arguments.part]
    for name, numbers in run(arguments.photos.resolve(), arguments.output.resolve()).items():
        print(f"{name:32}", "  ".join(f"{key} {value:.3f}" for key, value in numbers.items()))


if __name__ == "__main__":
    main()
