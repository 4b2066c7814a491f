"""Datasets in the shapes that the world has them in are each trained on, with every image counted."""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipelines.datasets import dataset
from pipelines.datasets.settings import Columns, DataSettings, Splits
from pipelines.training.validation import compute_logits
from tests.builders.training import RECIPE, picture, trained, trainer_on

NAMES = ("angular_leaf_spot", "bean_rust", "healthy")
OF_BEANS = {"train": [0, 1, 2] * 3, "validation": [0, 1, 2], "test": [2, 1, 0]}


def png(labels: Sequence[int], seed: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(picture(labels, np.random.default_rng(seed), side=20)).save(sink, "PNG")
    return sink.getvalue()


def hub(
    folder: Path, labels_of: dict[str, list[int]], *, image: str, label: str, names: Sequence[str]
) -> DataSettings:
    """Parquet as the hub serves it: a file per split, a struct of bytes and path, named class indices."""
    features = {image: {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
    for number, (split, labels) in enumerate(labels_of.items()):
        rows = [
            {"bytes": png([max(one, 0)], 100 * number + i), "path": f"{i}.png"}
            for i, one in enumerate(labels)
        ]
        table = pa.table(
            {"image_file_path": [f"/tmp/{i}" for i in range(len(labels))], image: rows, label: labels}
        )
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return DataSettings(str(folder), taxonomy="labels", splits=Splits(validation_of_train=0.25))


def cats_vs_dogs(folder: Path) -> DataSettings:
    return hub(folder, {"train": [0, 1] * 6}, image="image", label="labels", names=["cat", "dog"])


def beans(folder: Path) -> DataSettings:
    return hub(folder, OF_BEANS, image="image", label="labels", names=NAMES)


def img_column(folder: Path) -> DataSettings:
    return hub(folder, OF_BEANS, image="img", label="label", names=NAMES)


def unlabelled_test_split(folder: Path) -> DataSettings:
    return hub(folder, {**OF_BEANS, "test": [-1] * 4}, image="image", label="label", names=NAMES)


def metadata_csv(folder: Path) -> DataSettings:
    for number, (split, labels) in enumerate(OF_BEANS.items()):
        (folder / split).mkdir()
        lines = ["file_name,label"]
        for i, label in enumerate(labels):
            (folder / split / f"{i}.png").write_bytes(png([label], 100 * number + i))
            lines.append(f"{i}.png,{NAMES[label]}")
        (folder / split / "metadata.csv").write_text("\n".join(lines) + "\n")
    return DataSettings(str(folder), taxonomy="labels")


def metadata_without_labels_of_test(folder: Path) -> DataSettings:
    settings = metadata_csv(folder)
    table = folder / "test" / "metadata.csv"
    table.write_text("\n".join(line.split(",")[0] for line in table.read_text().splitlines()))
    return settings


def one_hot_csv(folder: Path) -> DataSettings:
    lines = ["file,action,drama,split"]
    for i, labels in enumerate([[0], [1], [0, 1], []] * 4):
        (folder / f"{i}.png").write_bytes(png(labels, i))
        lines.append(f"{i}.png,{int(0 in labels)},{int(1 in labels)},{'validation' if i < 4 else 'train'}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    columns = Columns(one_hot=("action", "drama"))
    return DataSettings(str(folder / "labels.csv"), taxonomy="labels", columns=columns)


def tars(folder: Path) -> DataSettings:
    for number, (split, labels) in enumerate(OF_BEANS.items()):
        with tarfile.open(folder / f"{split}-000000.tar", "w") as tar:
            for i, label in enumerate(labels):
                for suffix, payload in (
                    ("png", png([label], 100 * number + i)),
                    ("cls", NAMES[label].encode()),
                ):
                    member = tarfile.TarInfo(f"{i:06}.{suffix}")
                    member.size = len(payload)
                    tar.addfile(member, io.BytesIO(payload))
    return DataSettings(str(folder), taxonomy="labels")


@pytest.mark.parametrize(
    ("write", "images", "unlabelled"),
    [
        (cats_vs_dogs, {"cat": 6, "dog": 6}, 0),
        (beans, dict.fromkeys(NAMES, 5), 0),
        (img_column, dict.fromkeys(NAMES, 5), 0),
        (unlabelled_test_split, dict.fromkeys(NAMES, 4), 4),
        (metadata_csv, dict.fromkeys(NAMES, 5), 0),
        (metadata_without_labels_of_test, dict.fromkeys(NAMES, 4), 3),
        (one_hot_csv, {"action": 8, "drama": 8}, 0),
        (tars, dict.fromkeys(NAMES, 5), 0),
    ],
    ids=lambda one: one.__name__ if callable(one) else "",
)
def test_each_shape_of_dataset_trains_with_the_right_counts(
    write: Callable[[Path], DataSettings], images: dict[str, int], unlabelled: int, tmp_path: Path
) -> None:
    data = dataset.load(write(tmp_path))
    counted = data.images_per_class(data.rows_by_split())
    assert {one: sum(of[one] for of in counted.values()) for one in data.classes} == images
    assert data.dropped == {"without a label": unlabelled}
    made = trainer_on(replace(RECIPE, batch_size=4), data)
    assert dict(zip(data.classes, made.task.class_counts, strict=True)) == counted["train"]
    assert made.batches.training.targets_nc.sum() == sum(counted["train"].values())
    before = made.model.classifier.weight.clone()
    trained(made, 1)
    assert made.model.classifier.weight.isfinite().all() and not torch.equal(
        made.model.classifier.weight, before
    )
    logits_nc, targets_nc = compute_logits(
        made.model, made.batches.iter_validation(), made.task, precision="fp32"
    )
    assert targets_nc.sum(axis=0).tolist() == list(counted["validation"].values())
    assert len(logits_nc) == len(data.indices("validation")) and np.isfinite(logits_nc).all()
