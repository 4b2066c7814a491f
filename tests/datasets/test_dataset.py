"""Every accepted dataset becomes the same table; what cannot be used is refused or accounted for."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.datasets import dataset, pixels, splits
from pipelines.datasets.errors import DatasetError
from pipelines.datasets.settings import Columns, DataSettings, ImageCache, Splits
from pipelines.images.pixels import pixels_of
from pipelines.messages import InputError, JobFailed
from pipelines.specs import ImageSpec
from pipelines.taxonomy import taxonomy
from pipelines.training import decoded as corpus
from pipelines.training import evaluate, fit, runs
from pipelines.training.recipe import ClassBalance, Loss, Recipe
from pipelines.training.resources import Resources
from tests.builders.training import image_folder

SPEC = ImageSpec(height=16, width=16)
TENNIS = taxonomy.load().resolve("Sports > Tennis")


def csv(folder: Path, text: str, name: str = "labels.csv") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return str(folder / name)


def load(uri: str | Path, **settings) -> dataset.LabelledData:
    return dataset.load(DataSettings(str(uri), **settings))


def rows_of(data: dataset.LabelledData, *names: str) -> list[tuple]:
    return list(zip(*(data.rows[name].to_pylist() for name in names), strict=True))


def test_a_folder_of_labels_is_divided_70_20_10_in_every_class(tmp_path):
    data = load(str(image_folder(tmp_path / "images", per_class=20)))
    assert set(data.classes) == {"1", "483", "v9i3On"}
    by_split = Counter(zip(data.targets().tolist(), data.splits.tolist(), strict=True))
    assert by_split == {
        (label, split): count
        for label in range(3)
        for split, count in (("train", 14), ("validation", 4), ("test", 2))
    }
    again = load(tmp_path / "images")
    assert (again.splits == data.splits).all()
    assert (load(str(tmp_path / "images"), splits=Splits(seed=1)).splits != data.splits).any()


def test_a_folder_may_have_a_level_of_splits(tmp_path):
    for split in ("train", "val", "test"):
        image_folder(tmp_path / split, per_class=2)
    data = load(str(tmp_path))
    assert Counter(data.splits.tolist()) == {"train": 6, "validation": 6, "test": 6}


def test_a_folder_counts_every_name_of_an_image_and_no_folder_set_aside(tmp_path):
    image_folder(tmp_path / "test", per_class=2)
    (tmp_path / "test" / "1" / "0.png").rename(tmp_path / "test" / "1" / "0.JPE")
    (tmp_path / "test" / "1" / "notes.txt").write_text("no image")
    (tmp_path / "test" / "1").rename(tmp_path / "test" / "483" / "inner")
    (tmp_path / "test" / "v9i3On").rename(tmp_path / "test" / "_none")
    data = load(tmp_path)
    assert data.classes == ("483",)
    assert sorted(Path(uri).name for uri in data.rows["uri"].to_pylist()) == [
        "0.JPE",
        "0.png",
        "1.png",
        "1.png",
    ]


def test_a_tier_that_the_taxonomy_does_not_have_is_refused(tmp_path):
    folder = image_folder(tmp_path / "images", per_class=2)
    with pytest.raises(DatasetError, match=r"tier is 9; taxonomy 3.1 has tiers 1 to 4"):
        load(folder, tier=9)
    with pytest.raises(DatasetError, match=r"tier is 2; taxonomy labels has tiers 1 to 1"):
        load(folder, taxonomy="labels", tier=2)


def test_a_table_keeps_ids_as_text_and_carves_validation_out_of_train(tmp_path):
    lines = [f"{i}.jpg,{'001' if i % 2 else '1e3'},{'test' if i < 4 else 'train'}" for i in range(44)]
    table = csv(tmp_path, "\n".join(["file,label,split", *lines]))
    data = load(table, taxonomy="labels")
    assert data.classes == ("001", "1e3")
    assert Counter(data.splits.tolist()) == {"train": 36, "validation": 4, "test": 4}
    assert data.rows["uri"][0].as_py().endswith(f"{tmp_path}/0.jpg")


def test_labels_may_be_ids_paths_or_names_and_are_lifted_to_a_tier(tmp_path):
    table = csv(tmp_path, "uri,label\n/a.jpg,483\n/b.jpg,Sports > Tennis\n/c.jpg,Automotive\n")
    data = load(table)
    assert len(data.classes) == 3
    lifted = load(table, tier=1)
    assert lifted.classes == ("1", "483")
    assert lifted.targets().tolist() == [1, 1, 0]


def test_unknown_labels_are_refused_all_at_once_with_candidates(tmp_path):
    table = csv(tmp_path, "uri,label\n/a.jpg,Tenis\n/b.jpg,Sports\n/c.jpg,Qqqqq\n")
    with pytest.raises(dataset.UnknownLabels, match="2 of 3 labels") as refused:
        load(table)
    tenis = f"  Tenis: {TENNIS} (Sports > Tennis)?"
    assert str(refused.value).splitlines()[1:] == ["  Qqqqq: nothing similar", tenis]
    corrected = refused.value.label_map().decode().replace("?", "Automotive")
    assert load(table, label_map=csv(tmp_path, corrected, "map.csv")).classes == ("1", "483", TENNIS)


def test_labels_are_read_as_people_name_folders(tmp_path):
    names = ("auto-racing", "ice_hockey", "Food & Drink", "food-and-drink", "sports > auto-racing")
    table = csv(tmp_path, "uri,label\n" + "".join(f"/{i}.jpg,{name}\n" for i, name in enumerate(names)))
    data = load(table)
    paths = {data.taxonomy.path(one) for one in data.classes}
    assert paths == {"Sports > Auto Racing", "Sports > Ice Hockey", "Food & Drink"}


def test_a_label_map_with_or_without_a_header_renames_and_drops(tmp_path):
    table = csv(tmp_path, "uri,label\n/a.jpg,tennis ball\n/b.jpg,car\n/c.jpg,blurry\n")
    lines = "tennis ball,Sports > Tennis\ncar,Automotive\nblurry,\n"
    for text in (f"from,to\n{lines}", lines):
        data = load(table, label_map=csv(tmp_path, text, "map.csv"))
        assert data.rows.num_rows == 2 and data.dropped == {"without a label": 1}
        assert "1" in data.classes
    several = csv(tmp_path, "uri,labels\n/a.jpg,x|blurry\n/b.jpg,y\n/c.jpg,blurry\n", "several.csv")
    data = load(several, taxonomy="labels", label_map=csv(tmp_path, "from,to\nblurry,\n", "map.csv"))
    assert data.targets().tolist() == [[1, 0], [0, 1], [0, 0]], "of several labels none is an answer too"
    with pytest.raises(InputError, match=r"--label-map .*nowhere.csv does not exist"):
        load(table, label_map=str(tmp_path / "nowhere.csv"))


def test_a_breeds_table_names_its_files_by_a_template(tmp_path):
    table = csv(tmp_path, "id,breed\n0a1,pug\n0b2,collie\n0c3,pug\n")
    data = load(table, taxonomy="labels", columns=Columns(label="breed", file="train/{id}.jpg"))
    assert data.rows["uri"][1].as_py().endswith(f"{tmp_path}/train/0b2.jpg")
    with pytest.raises(DatasetError, match="no column"):
        load(table, columns=Columns(label="breed", file="train/{name}.jpg"))


def test_a_column_that_is_named_wins_over_labels(tmp_path):
    table = csv(tmp_path, "file,labels,breed\na.jpg,x|y,pug\nb.jpg,y,collie\n")
    breed = Columns(label="breed")
    data = load(table, taxonomy="labels", columns=breed)
    assert data.classes == ("collie", "pug") and not data.multi_label
    assert load(table, taxonomy="labels").classes == ("x", "y")
    samples = {"0": {"labels": ["x", "y"], "breed": "pug"}, "1": {"labels": ["y"], "breed": "collie"}}
    files = {f"{key}.json": json.dumps(value).encode() for key, value in samples.items()}
    pack(tmp_path / "x.tar", files | {f"{key}.png": b"png" for key in samples})
    data = load(tmp_path / "x.tar", taxonomy="labels", columns=breed)
    assert data.classes == ("collie", "pug") and not data.multi_label
    with pytest.raises(DatasetError, match="no column 'bred' among file, labels, breed"):
        load(table, taxonomy="labels", columns=Columns(label="bred"))


def test_several_labels_make_a_multi_label_model_and_none_is_a_right_answer(tmp_path):
    table = csv(tmp_path, "file,labels\na.jpg,red|green\nb.jpg,\nc.jpg,green\nd.jpg,red\n")
    data = load(table, taxonomy="labels")
    assert data.multi_label and data.classes == ("green", "red")
    assert data.targets().tolist() == [[1, 1], [0, 0], [1, 0], [0, 1]]


def test_one_hot_columns_make_a_multi_label_model(tmp_path):
    one_hot = Columns(one_hot=("action", "drama"))
    table = csv(tmp_path, "file,action,drama\na.jpg,1,0\nb.jpg,0,0\nc.jpg,1,1\n")
    data = load(table, taxonomy="labels", columns=one_hot)
    assert data.multi_label and data.classes == ("action", "drama")
    assert data.targets().tolist() == [[1, 0], [0, 0], [1, 1]]
    values = {"file": ["a", "b", "c"], "action": [1, -1, 0], "drama": pa.array([True, False, None])}
    pq.write_table(pa.table(values), tmp_path / "numbers.parquet")
    numbers = load(tmp_path / "numbers.parquet", taxonomy="labels", columns=one_hot)
    assert numbers.rows.num_rows == 1 and numbers.dropped == {"without a label": 2}
    with pytest.raises(InputError, match=r"column 'action' of .* holds '2'"):
        load(csv(tmp_path, "file,action,drama\na,2,0\n"), taxonomy="labels", columns=one_hot)
    with pytest.raises(InputError, match="no column 'war'"):
        load(table, taxonomy="labels", columns=Columns(one_hot=("action", "war")))


def test_json_lines_with_lists_of_labels(tmp_path):
    table = tmp_path / "labels.jsonl"
    table.write_text("\n".join(json.dumps(row) for row in [
        {"uri": "/a.jpg", "labels": ["x", "y"]},
        {"uri": "/b.jpg", "labels": []},
        {"uri": "/c.jpg", "labels": ["y"]},
    ]))  # fmt: skip
    assert load(str(table), taxonomy="labels").targets().tolist() == [[1, 1], [0, 0], [0, 1]]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()),
        pa.list_(pa.string()), pa.large_list(pa.large_string()),
    ],
    ids=str,
)  # fmt: skip
def test_several_labels_may_be_of_any_text_or_list_type_and_null_is_unlabelled(tmp_path, kind):
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    values = [["red", "green"], None, ["green"], ["red"]] if is_list else ["red|green", None, "green", "red"]
    labels = pa.array(values, None if pa.types.is_dictionary(kind) else kind)
    labels = labels.dictionary_encode() if pa.types.is_dictionary(kind) else labels
    pq.write_table(pa.table({"file": list("abcd"), "labels": labels}), tmp_path / "labels.parquet")
    data = load(tmp_path / "labels.parquet", taxonomy="labels")
    assert data.multi_label and data.classes == ("green", "red")
    assert data.targets().tolist() == [[1, 1], [1, 0], [0, 1]]
    assert data.dropped == {"without a label": 1}


@pytest.mark.parametrize("column", ["image", "img", "picture"])
@pytest.mark.parametrize("kind", [pa.binary(), pa.struct([("bytes", pa.binary()), ("path", pa.string())])])
@pytest.mark.parametrize("named", [True, False])
def test_hub_datasets_name_their_columns_as_they_like_and_mark_unlabelled_images(
    tmp_path, column, kind, named
):
    """As cats_vs_dogs and beans: integers in `labels`; -1 and null where nobody labelled the image."""
    labels = pa.array([0, 1, -1, 1, None, 0], pa.int64())
    table = pa.table({column: pa.nulls(6, kind), "labels": labels})
    if named:
        feature = {"labels": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": feature}})})
    pq.write_table(table, tmp_path / "train.parquet")
    data = load(tmp_path, taxonomy="labels")
    assert data.classes == (("cat", "dog") if named else ("0", "1"))
    assert not data.multi_label
    assert data.targets().tolist() == [0, 1, 1, 0]
    assert data.rows["offset"].to_pylist() == [0, 1, 3, 5]
    assert set(data.rows["payload_column"].to_pylist()) == {column}
    assert data.dropped == {"without a label": 2}


def test_text_of_minus_one_is_no_label(tmp_path):
    """As a CSV has it, by itself or with a pandas that made the column floats."""
    for text in ("file,label\na,x\nb,-1\nc, -1.0\nd,y\n", "file,labels\na,x|y\nb,-1\nc,-1|x\nd,y\n"):
        data = load(csv(tmp_path, text), taxonomy="labels")
        assert data.classes == ("x", "y") and data.dropped == {"without a label": 2}
    one_hot = csv(tmp_path, "file,a,b\nx,1,0\ny,-1,-1\nz,0,-1\n")
    data = load(one_hot, taxonomy="labels", columns=Columns(one_hot=("a", "b")))
    assert data.targets().tolist() == [[1]] and data.dropped == {"without a label": 2}
    files = {"0.json": b'{"label": "-1"}', "1.json": b'{"label": "x"}', "2.cls": b"-1\n"}
    pack(tmp_path / "x.tar", files | {f"{key}.png": b"png" for key in range(3)})
    data = load(tmp_path / "x.tar", taxonomy="labels")
    assert data.classes == ("x",) and data.dropped == {"without a label": 2}


@pytest.mark.parametrize("column", ["label", "labels"])
@pytest.mark.parametrize("named", [True, False])
def test_whole_floats_are_class_indices(tmp_path, column, named):
    """pandas makes integers with nulls floats; NaN is what it writes without its index of nulls."""
    table = pa.table({"file": list("abcde"), column: [0.0, 1.0, None, float("nan"), -1.0]})
    if named:
        feature = {column: {"names": ["cat", "dog"], "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": feature}})})
    pq.write_table(table, tmp_path / "train.parquet")
    data = load(tmp_path / "train.parquet", taxonomy="labels", columns=Columns(split=""))
    assert data.classes == (("cat", "dog") if named else ("0", "1")) and not data.multi_label
    assert data.dropped == {"without a label": 3}


def test_lists_of_class_indices_make_a_multi_label_model(tmp_path):
    feature = {"label": {"feature": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "_type": "Sequence"}}
    labels = pa.array([[0, 1], [], [-1], [1], None], pa.list_(pa.int64()))
    table = pa.table({"img": pa.nulls(5, pa.binary()), "label": labels})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": feature}})})
    pq.write_table(table, tmp_path / "train.parquet")
    data = load(tmp_path, taxonomy="labels")
    assert data.multi_label and data.classes == ("cat", "dog")
    assert data.targets().tolist() == [[1, 1], [0, 0], [0, 1]]
    assert data.dropped == {"without a label": 2}


def test_a_class_index_without_a_name_is_refused(tmp_path):
    feature = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    table = pa.table({"image": pa.nulls(2, pa.binary()), "label": [0, 2]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": feature}})})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(InputError, match="label 2 has no name; the dataset names 2 labels"):
        load(tmp_path, taxonomy="labels")
    halves = pa.table(
        {"image": pa.nulls(2, pa.binary()), "label": [0.0, 0.5]}, metadata=table.schema.metadata
    )
    pq.write_table(halves, tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"label 0\.5 has no name"):
        load(tmp_path, taxonomy="labels")


def test_a_column_called_image_holds_images_only_when_it_is_binary(tmp_path):
    table = csv(tmp_path, "file,image,label\na.jpg,first,x\nb.jpg,second,y\n")
    data = load(table, taxonomy="labels", columns=Columns(split=""))
    assert [Path(uri).name for uri in data.rows["uri"].to_pylist()] == ["a.jpg", "b.jpg"]
    assert data.rows["container"].null_count == 2
    for payload in (pa.large_binary(), pa.struct([("bytes", pa.binary()), ("path", pa.string())])):
        rows = {"image": pa.nulls(2, payload), "label": ["x", "y"]}
        pq.write_table(pa.table(rows), tmp_path / "inside.parquet")
        assert load(tmp_path / "inside.parquet", taxonomy="labels").rows["container"].null_count == 0
    pq.write_table(pa.table({"image": ["a.jpg"], "file": ["a.jpg"], "label": ["x"]}), tmp_path / "t.parquet")
    assert load(tmp_path / "t.parquet", taxonomy="labels").rows["uri"][0].as_py().endswith("/a.jpg")


def test_metadata_next_to_the_images_names_their_labels(tmp_path):
    for part, n in (("train", 4), ("test", 2)):
        lines = [f"{i}.png,{'cat' if i % 2 else 'dog'}" for i in range(n)]
        csv(tmp_path / part, "\n".join(["file_name,label", *lines]), "metadata.csv")
        for i in range(n):
            (tmp_path / part / f"{i}.png").touch()
    data = load(tmp_path, taxonomy="labels", splits=Splits(validation_of_train=0))
    assert data.classes == ("cat", "dog")
    assert Counter(data.splits.tolist()) == {"train": 4, "test": 2}
    assert str(tmp_path / "test" / "1.png") in data.rows["uri"].to_pylist()


def test_metadata_of_a_test_split_may_lack_the_labels(tmp_path):
    """As public test splits on the hub do; a run's slices need not be there either."""
    csv(tmp_path / "train", "file_name,label,site\n0.png,cat,a\n1.png,dog,b\n", "metadata.csv")
    test = csv(tmp_path / "test", "file_name\n0.png\n", "metadata.csv")
    for name in ("train/0.png", "train/1.png", "test/0.png"):
        (tmp_path / name).touch()
    for columns in (Columns(), Columns(slices=("site",))):
        data = load(tmp_path, taxonomy="labels", columns=columns, splits=Splits(validation_of_train=0))
        assert data.classes == ("cat", "dog") and set(data.splits) == {"train"}
        assert data.dropped == {"without a label": 1}
    with pytest.raises(DatasetError, match="no column 'label' among file_name"):
        load(test, taxonomy="labels")
    csv(tmp_path / "train", "file_name,text\n0.png,a cat\n", "metadata.csv")
    with pytest.raises(DatasetError, match=r"are named by splits, and no metadata\.csv .* labels"):
        load(tmp_path, taxonomy="labels")


def test_metadata_without_labels_leaves_them_to_the_folders(tmp_path):
    folder = image_folder(tmp_path, per_class=2)
    csv(folder, "file_name,text\n1/0.png,a car\n", "metadata.csv")
    assert set(load(folder).classes) == {"1", "483", "v9i3On"}


def pack(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, payload in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))


def test_webdataset_shards_are_read_with_their_labels_and_bytes(tmp_path):
    source = image_folder(tmp_path / "source", per_class=2)
    images = [(file.read_bytes(), file.parent.name) for file in sorted(source.rglob("*.png"))]
    shards = tmp_path / "shards"
    shards.mkdir()
    for part, suffix in (("train", "cls"), ("test", "json")):
        files = {}
        for i, (payload, label) in enumerate(images):
            text = label if suffix == "cls" else json.dumps({"label": label})
            files |= {f"{i:03}.png": payload, f"{i:03}.{suffix}": text.encode()}
        pack(shards / f"{part}-000.tar", files | {"999.png": images[0][0], "999.cls": b"-1"})
    data = load(shards, splits=Splits(validation_of_train=0))
    assert set(data.classes) == {"1", "483", "v9i3On"} and data.dropped == {"without a label": 2}
    assert Counter(data.splits.tolist()) == {"train": 6, "test": 6}
    chosen = np.arange(12)
    batch = data.rows.append_column("item_id", pa.array(chosen))
    decoded = pixels.decode_batch(batch, SPEC)
    assert decoded["status"].to_pylist() == ["ok"] * 12
    assert decoded["sha256"].to_pylist() == [hashlib.sha256(payload).hexdigest() for payload, _ in images] * 2
    assert load(shards / "train-000.tar").rows.num_rows == 6


def test_lists_in_a_shard_make_a_multi_label_model(tmp_path):
    labels = {"0": ["a", "b"], "1": [], "2": ["b"]}
    files = {f"{key}.json": json.dumps({"labels": value}).encode() for key, value in labels.items()}
    pack(tmp_path / "x.tar", files | {f"{key}.png": b"png" for key in labels})
    data = load(tmp_path / "x.tar", taxonomy="labels")
    assert data.multi_label and data.targets().tolist() == [[1, 1], [0, 0], [0, 1]]


def hugging_face_parquet(folder: Path) -> Path:
    """Two splits with the bytes inside and integer labels named in the schema, as on the hub."""
    source = image_folder(folder / "source", per_class=4)
    out = folder / "parquet"
    out.mkdir()
    names = ["483", "1", "v9i3On"]
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    for split in ("train", "test"):
        images = [
            (file.read_bytes(), i) for i, name in enumerate(names) for file in (source / name).iterdir()
        ]
        table = pa.table(
            {
                "image": [{"bytes": payload, "path": None} for payload, _ in images],
                "label": pa.array([label for _, label in images], pa.int64()),
            }
        ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, out / f"{split}-00000-of-00001.parquet", row_group_size=5)
    return out


def test_hugging_face_parquet_is_read_with_its_label_names_and_bytes(tmp_path):
    data = load(str(hugging_face_parquet(tmp_path)), splits=Splits(validation_of_train=0))
    assert Counter(data.splits.tolist()) == {"train": 12, "test": 12}
    assert set(data.classes) == {"1", "483", "v9i3On"}
    chosen = np.array([0, 7, 20])
    batch = data.rows.take(pa.array(chosen)).append_column("item_id", pa.array(chosen))
    decoded = pixels.decode_batch(batch, SPEC)
    assert decoded["status"].to_pylist() == ["ok"] * 3
    pixels_nhwc = pixels_of(decoded["pixels"], SPEC)
    labels = [data.classes[i] for (i,) in decoded["classes"].to_pylist()]
    names = ["483", "1", "v9i3On"]
    quarters = {name: divmod(i, 2) for i, name in enumerate(names)}
    for one, label in zip(pixels_nhwc, labels, strict=True):
        y, x = quarters[label]
        assert one[y * 8 + 2 : y * 8 + 6, x * 8 + 2 : x * 8 + 6].std(axis=(0, 1)).max() < 20


@pytest.mark.parametrize("metadata", [b"{", b"[]", b'{"info": {"features": {"label": 3}}}'])
def test_hugging_face_metadata_that_cannot_be_read_is_wrong_input(tmp_path, metadata):
    table = pa.table({"uri": ["a.jpg"], "label": [0]})
    pq.write_table(table.replace_schema_metadata({b"huggingface": metadata}), tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"Hugging Face metadata of .*train.parquet cannot be read"):
        load(tmp_path / "train.parquet", taxonomy="labels")


def test_run_folder_that_cannot_be_read_is_wrong_input(tmp_path):
    (tmp_path / "recipe.json").write_text("{")
    (tmp_path / "splits.parquet").write_bytes(b"PAR1 but not really PAR1")
    with pytest.raises(InputError, match=r"recipe\.json is not JSON"):
        runs.recorded_data_settings(str(tmp_path))
    with pytest.raises(InputError, match=r"splits\.parquet cannot be read"):
        runs.recorded_splits(str(tmp_path))


def test_groups_stay_whole_and_straddling_ones_are_refused(tmp_path):
    rows = [f"{i}.jpg,{i % 2},site{i // 5}" for i in range(100)]
    data = load(csv(tmp_path, "\n".join(["file,label,group", *rows])), taxonomy="labels")
    of_group = {}
    for uri, split in rows_of(data, "uri", "split"):
        of_group.setdefault(int(Path(uri).stem) // 5, set()).add(split)
    assert all(len(found) == 1 for found in of_group.values())
    assert set(data.splits) == {"train", "validation", "test"}
    straddling = csv(tmp_path, "file,label,split,group\na,x,train,g\nb,y,test,g\nc,x,train,h\n", "b.csv")
    with pytest.raises(InputError, match="'g'"):
        load(straddling, taxonomy="labels")


@pytest.mark.parametrize(
    ("columns", "setting"),
    [
        (Columns(group="pages"), "columns.group"),
        (Columns(split="pages"), "columns.split"),
        (Columns(slices=("page", "pages")), "slices"),
    ],
)
def test_a_column_that_is_named_and_missing_is_refused_with_those_there_are(tmp_path, columns, setting):
    table = csv(tmp_path / "table", "file,label,page\na.jpg,x,1\nb.jpg,y,2\n")
    with pytest.raises(DatasetError, match=f"'pages', which {setting} names; .* file, label, page"):
        load(table, taxonomy="labels", columns=columns)
    folder = image_folder(tmp_path / "folder", per_class=2)
    shard = tmp_path / "shards" / "x.tar"
    shard.parent.mkdir()
    pack(shard, {"0.png": b"png", "0.cls": b"x"})
    for uri in (folder, shard, shard.parent):
        with pytest.raises(DatasetError, match=f"which {setting} names; .*have no columns: give a table"):
            load(uri, taxonomy="labels", columns=columns)


def test_a_folder_is_not_read_by_its_names_where_a_column_of_labels_is_named(tmp_path):
    folder = image_folder(tmp_path / "folder", per_class=2)
    for columns in (Columns(label="breed"), Columns(one_hot=("pug", "collie"))):
        with pytest.raises(DatasetError, match="have no columns: give a table"):
            load(folder, columns=columns)
    pack(tmp_path / "x.tar", {"0.png": b"png", "0.json": b'{"breed": "pug"}'})
    assert load(tmp_path / "x.tar", taxonomy="labels", columns=Columns(label="breed")).classes == ("pug",)


def test_a_group_may_be_named_in_some_files_of_a_dataset_only(tmp_path):
    """The test split of a dataset need not say of which page its images are."""
    parquet = {"train": {"uri": list("abcd"), "label": list("xxyy"), "page": list("1122")}}
    parquet["test"] = {"uri": ["e"], "label": ["x"]}
    for name, values in parquet.items():
        pq.write_table(pa.table(values), tmp_path / f"{name}.parquet")
    data = load(tmp_path, taxonomy="labels", columns=Columns(group="page"))
    assert sorted(data.rows["group"].to_pylist(), key=str) == ["1", "1", "2", "2", None]


def test_a_limit_keeps_a_seeded_part_of_every_class(tmp_path):
    rows = [f"{i}.jpg,{'rare' if i < 20 else 'common'}" for i in range(200)]
    table = csv(tmp_path, "\n".join(["file,label", *rows]))
    data = load(table, taxonomy="labels", splits=Splits(limit=50))
    assert Counter(data.targets().tolist()) == {0: 45, 1: 5}
    assert rows_of(data, "uri") == rows_of(load(table, taxonomy="labels", splits=Splits(limit=50)), "uri")


MILLION_ROWS = """
import resource, sys, time
import numpy as np
from pipelines.datasets import dataset
from pipelines.datasets.settings import DataSettings
from pipelines.training import runs
from pipelines.training.decoded import one_pass
from pipelines.training.recipe import ClassBalance, Recipe
data = dataset.load(DataSettings(sys.argv[1], taxonomy="labels"))
runs.begin(sys.argv[2], Recipe(), data)
train = data.indices("train")
counts = data.class_counts(train)
drawn = one_pass(data.targets()[train], ClassBalance(sampling="oversample"), np.random.default_rng(0))
assert len(drawn) == len(counts) * counts.max()
peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(data.splits), len(train), len(drawn), time.process_time(), peak_kib / 2**20)
"""


@pytest.mark.slow
def test_a_million_rows_are_divided_counted_and_planned_within_a_minute_and_two_gib(tmp_path):
    """CPU seconds: those of a busy machine pass more slowly."""
    names = [f"https://example.com/photos/2026/{i:07}/photo.jpg" for i in range(1_000_000)]
    share = 1 / (np.arange(700) + 20)  # 14,000 images of the first class, 400 of the last
    labels = np.random.default_rng(0).choice(700, len(names), p=share / share.sum())
    pq.write_table(
        pa.table({"uri": names, "label": pa.array(labels).cast(pa.string())}), tmp_path / "l.parquet"
    )
    arguments = [sys.executable, "-c", MILLION_ROWS, str(tmp_path / "l.parquet"), str(tmp_path / "run")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=900)
    rows, n_train, _, cpu_s, peak_gib = map(float, done.stdout.split())
    print(f"{cpu_s:.1f} CPU seconds, peak {peak_gib:.2f} GiB")
    assert (rows, round(n_train / rows, 2)) == (1_000_000, 0.7)
    assert cpu_s < 60 and peak_gib < 2


@pytest.mark.parametrize("limit", [1, 100, 150, 299, 301, 2999])
def test_a_limit_is_met_exactly_however_many_classes_there_are(limit):
    strata = np.repeat(np.arange(300), 10)
    kept = splits.sample(strata, limit, seed=0)
    assert len(set(kept)) == limit
    per_class = np.bincount(strata[kept], minlength=300)
    assert per_class.max() - per_class.min() <= 1
    assert (kept == splits.sample(strata, limit, seed=0)).all()
    assert set(kept) != set(splits.sample(strata, limit, seed=1))


def test_classes_of_two_images_fill_every_split_together():
    strata = np.repeat(np.arange(300), 2)
    shares = {"train": 0.7, "validation": 0.2, "test": 0.1}
    chosen = splits.divide(strata, np.arange(600), shares, seed=0)
    assert Counter(chosen.tolist()) == {"train": 420, "validation": 120, "test": 60}
    assert set(strata[chosen == "train"]) == set(range(300))


def test_rows_with_an_empty_group_are_groups_of_their_own(tmp_path):
    rows = [f"{i}.jpg,{i % 2},{'g' if i < 4 else ''}" for i in range(100)]
    data = load(csv(tmp_path, "\n".join(["file,label,group", *rows])), taxonomy="labels")
    assert Counter(data.splits.tolist()) == {"train": 70, "validation": 20, "test": 10}
    assert len(set(data.splits[:4])) == 1
    given = [f"{i}.jpg,{i % 2},{'test' if i % 5 else 'train'}," for i in range(20)]
    load(csv(tmp_path, "\n".join(["file,label,split,group", *given]), "given.csv"), taxonomy="labels")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,colour\na,x\n", "no column 'label'"),
        ("name,label\na,x\nb,y\n", "uri"),
        ("file,label,split\na,x,holdout\nb,y,train\n", "holdout"),
    ],
)
def test_datasets_that_cannot_be_used_are_refused_with_the_reason(tmp_path, text, words):
    with pytest.raises(InputError, match=words):
        load(csv(tmp_path, text), taxonomy="labels")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,label\na,x\nb,x\n", "at least 2"),
        ("file,label,split\na,x,test\nb,y,test\n", "no train images"),
        ("file,label,split\na,x,train\nb,y,test\n", "no validation images"),
    ],
)
def test_datasets_that_cannot_be_learned_from_can_still_be_measured_on(tmp_path, text, words):
    data = load(csv(tmp_path, text), taxonomy="labels", splits=Splits(validation_of_train=0))
    with pytest.raises(DatasetError, match=words):
        fit.plan_job(data, Recipe(model="scratch:tiny"), str(tmp_path / "run"), Resources())


def test_folders_and_parquet_of_test_images_alone_are_read(tmp_path):
    image_folder(tmp_path / "folder" / "test", per_class=2, classes=("1",))
    folder = load(tmp_path / "folder")
    assert folder.classes == ("1",) and set(folder.splits) == {"test"}
    parquet = hugging_face_parquet(tmp_path / "hub")
    (parquet / "train-00000-of-00001.parquet").unlink()
    assert set(load(parquet).splits) == {"test"}


def test_without_a_split_column_no_name_says_the_split_either(tmp_path):
    image_folder(tmp_path / "folder" / "test", per_class=20)
    undivided = Columns(split="")
    assert set(load(tmp_path / "folder", columns=undivided).splits) == {"train", "validation", "test"}
    parquet = hugging_face_parquet(tmp_path / "hub")
    assert set(load(parquet, columns=undivided).splits) == {"train", "validation", "test"}


def test_missing_and_empty_folders_are_refused(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DatasetError):
            load(str(folder))


def test_runs_on_other_data_are_other_runs(tmp_path):
    folder = str(image_folder(tmp_path / "images"))
    table = csv(tmp_path, "file,label,split,k\na.jpg,1,train,1\nb.jpg,483,train,483\nc.jpg,1,validation,1\n")

    def differences(before: DataSettings, now: DataSettings) -> str:
        first, second = (runs.identity(Recipe(), dataset.load(one)) for one in (before, now))
        with pytest.raises(InputError) as refused:
            runs.refuse_mismatch("run", json.loads(runs.as_json(first)), second)
        return str(refused.value)

    assert "splits seed was 0, now 1" in differences(
        DataSettings(folder), DataSettings(folder, splits=Splits(seed=1))
    )
    assert "tier was None, now 1" in differences(DataSettings(table), DataSettings(table, tier=1))
    short, long = (runs.identity(Recipe(epochs=epochs), load(table)) for epochs in (10, 20))
    with pytest.raises(InputError, match=r"epochs was 10, now 20; .* further: --model run/best"):
        runs.refuse_mismatch("run", json.loads(runs.as_json(short)), long)
    before = runs.identity(Recipe(), load(table))
    csv(tmp_path, "file,label,split,k\na.jpg,483,train,1\nb.jpg,1,train,483\nc.jpg,1,validation,1\n")
    with pytest.raises(InputError, match="assignment"):
        runs.refuse_mismatch("run", json.loads(runs.as_json(before)), runs.identity(Recipe(), load(table)))


def test_a_run_records_its_splits_and_settings_without_credentials(tmp_path):
    lines = [f"https://me:hunter2@h/{i}.jpg?sig=s3cret,{i % 2}" for i in range(40)]
    table = csv(tmp_path, "\n".join(["uri,label", *lines]))
    data = load(table, taxonomy="labels")
    runs.begin(str(tmp_path / "run"), Recipe(), data)
    recorded = pq.read_table(tmp_path / "run" / "splits.parquet")
    assert recorded["uri"][3].as_py() == "https://h/3.jpg?sig=REDACTED"
    assert recorded["split"].to_pylist() == data.splits.tolist()
    identity = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert identity["dataset"]["splits"] == {**vars(Splits())}
    assert identity["dataset"]["uri"] == table


def test_the_report_counts_the_images_that_were_used_and_names_all_that_was_done(tmp_path):
    data = load(image_folder(tmp_path / "images", per_class=20))
    rows = {name: data.indices(name)[3:] for name in ("train", "validation", "test")}
    used = corpus.DecodedData(data, SPEC, SPEC, {}, rows, "memory", ImageCache(), [], {})
    counts = data.images_per_class({name: used.rows[name] for name in ("train", "test")})
    assert {name: sum(found.values()) for name, found in counts.items()} == {"train": 39, "test": 3}
    balance = ClassBalance(sampling="oversample", class_weights="sqrt")
    words = evaluate.describe_balancing(Recipe(class_balance=balance, loss=Loss(focal_gamma=2)))
    assert "focal loss (gamma 2)" in words and "(sqrt, counted as sampled)" in words
    assert evaluate.describe_balancing(Recipe()) == "Nothing was done about rare classes."


def test_copies_in_two_splits_stay_where_they_are_measured():
    digests = ["a", "a", "b", "b", "c", "c", None, None]
    where = np.array(["train", "test", "train", "validation", "train", "train", "train", "test"])
    assert splits.find_leaking_copies(digests, where).tolist() == [True, False, True, False] + [False] * 4


def test_the_way_of_keeping_images_follows_their_size():
    room = pixels.Room(memory=100, disk=1000)
    chosen = [pixels.choose_mode(ImageCache(), size, room) for size in (100, 101, 1000, 1001)]
    assert chosen == ["memory", "disk", "disk", "stream"]
    assert pixels.choose_mode(ImageCache(mode="stream"), 1, room) == "stream"


@pytest.mark.ray
def test_broken_and_copied_images_are_left_out_and_counted(ray_cluster, tmp_path):
    folder = image_folder(tmp_path / "images", per_class=10)
    (folder / "1" / "0.png").write_bytes(b"not an image")
    (folder / "483" / "1.png").write_bytes(b"")
    data = load(str(folder), splits=Splits(validation=0.3, test=0.3))
    uris = [uri.removeprefix("file://") for uri in data.rows["uri"].to_pylist()]
    whole = [
        row for row in range(30) if uris[row] not in map(str, (folder / "1/0.png", folder / "483/1.png"))
    ]
    test_row = next(row for row in whole if data.splits[row] == "test")
    train_row = next(row for row in whole if data.splits[row] == "train")
    Path(uris[train_row]).write_bytes(Path(uris[test_row]).read_bytes())
    found = corpus.prepare(data, SPEC, ImageCache(max_unreadable_fraction=0.2), seed=0)
    assert {image["status"] for image in found.unreadable} == {"not_an_image", "empty"}
    assert found.duplicates == {"train": 1}
    assert sum(len(rows) for rows in found.rows.values()) == 27
    assert train_row not in found.rows["train"] and test_row in found.rows["test"]
    with pytest.raises(JobFailed, match="max-unreadable-fraction"):
        corpus.prepare(data, SPEC, ImageCache(max_unreadable_fraction=0.0), seed=0)
