"""What the benchmarks classify, and with what: many distinct URIs over few files, and a model of any size.

Weights are random: these runs measure time and memory, and nobody reads their labels.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from export.settings import ParitySettings
from jobs import demo_images
from pipelines.specs import ImageSpec, Precision

CLASS_IDS = ("1", "27", "483", "530", "avbNf2", "672", "243", "275")
MOST_ROWS, ROWS_AT_ONCE = 20_000_000, 500_000
EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".gif"}


@dataclass(frozen=True)
class Vit:
    """The size of a Vision Transformer."""

    image_size: int
    patch_size: int
    hidden: int
    layers: int
    heads: int


VIT_TINY = Vit(image_size=224, patch_size=16, hidden=192, layers=12, heads=3)
VIT_MINIATURE = Vit(image_size=32, patch_size=16, hidden=32, layers=1, heads=2)
"""So small that everything but the model shows."""


def random_bundle(folder: Path, vit: Vit, *, precisions: Sequence[Precision] = ("fp32",)) -> Path:
    """A certified bundle of a ViT with random weights."""
    from export import release
    from export.images import OwnImages

    drawn_files(folder / "samples", count=64 if "int8" in precisions else 24, size=None)
    bundle = folder / "bundle"
    few = ParitySettings(sample_images=16, min_images=16)
    source, samples = checkpoint(folder / "checkpoint", vit), folder / "samples"
    release.export(str(source), OwnImages(str(samples)), str(bundle), precisions=precisions, settings=few)
    return bundle


def checkpoint(folder: Path, vit: Vit) -> Path:
    """A checkpoint folder as training leaves it."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=vit.image_size,
        patch_size=vit.patch_size,
        hidden_size=vit.hidden,
        num_hidden_layers=vit.layers,
        num_attention_heads=vit.heads,
        intermediate_size=4 * vit.hidden,
        id2label=dict(enumerate(CLASS_IDS)),
        label2id={class_id: index for index, class_id in enumerate(CLASS_IDS)},
        problem_type="single_label_classification",
    )
    model = ViTForImageClassification(config).eval()
    # Clear winners: the classes of random weights are so close that int8 would swap them and be refused.
    model.classifier.bias.data = 2 * torch.arange(len(CLASS_IDS), dtype=torch.float32)
    model.save_pretrained(folder)
    ours = {
        "taxonomy": "3.1",
        "class_ids": CLASS_IDS,
        "image_spec": asdict(ImageSpec(height=vit.image_size, width=vit.image_size)),
        "temperature": 1.0,
        "thresholds": {},
        "multi_label": False,
    }
    (folder / "iab_vision.json").write_text(json.dumps(ours))
    return folder


def drawn_files(folder: Path, *, count: int, size: tuple[int, int] | None) -> list[Path]:
    """JPEGs of drawn scenes, quality 85, all of `size` (width, height) or each of its own."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    subjects = sorted(demo_images.SUBJECTS)
    paths = []
    for number in range(count):
        scene = demo_images.draw(subjects[number % len(subjects)], rng)
        if size:
            scene = demo_images.noisy(scene.resize(size, Image.Resampling.BICUBIC), rng)
        paths.append(folder / f"{number:04d}.jpg")
        scene.save(paths[-1], quality=85)
    return paths


def given_or_drawn(images: Path | None, folder: Path) -> list[Path]:
    """The images of a folder; if none is given, 500 drawn ones of 500 x 375 below `folder`."""
    return image_files(images) if images else drawn_files(folder / "drawn", count=500, size=(500, 375))


def image_files(folder: Path) -> list[Path]:
    """Every image below a folder, in an order that mixes its subfolders."""
    paths = sorted(path.resolve() for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    np.random.default_rng(0).shuffle(paths)
    return paths


def inventory(folder: Path, sources: Sequence[Path], rows: int) -> Path:
    """A table of `rows` rows, each with a URI of its own, over the sources in turn.

    The files are in a folder with symbolic links to itself: the way through them is the number.
    """
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    for number in range(MOST_ROWS // 10_000):
        (pictures / f"{number:02d}").symlink_to(pictures)
    names = [f"{number:06d}{source.suffix}" for number, source in enumerate(sources)]
    for name, source in zip(names, sources, strict=True):
        (pictures / name).symlink_to(source)
    path = folder / "inventory.parquet"
    schema = pa.schema([("uri", pa.string()), ("page_url", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, ROWS_AT_ONCE):
            numbers = range(start, min(start + ROWS_AT_ONCE, rows))
            uris = [
                f"{pictures}/{n // 10_000:02d}/{n // 100 % 100:02d}/{n % 100:02d}/{names[n % len(names)]}"
                for n in numbers
            ]
            pages = [f"https://publisher.example/articles/{n // 3}" for n in numbers]
            writer.write_table(pa.table([uris, pages], schema=schema))
    return path
