"""What is in a dataset is found before training: counts, broken files, copies of pictures, sizes."""

import html.parser
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import inspect_dataset
from jobs.inspect_dataset import InspectConfig
from pipelines.datasets import dataset
from pipelines.datasets.settings import DataSettings
from pipelines.inspection import duplicates, inspect, page
from pipelines.messages import InputError

TENNIS, AUTO = "Sports > Tennis", "Automotive"


def photo(seed: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """Smooth colours, as unlike each other as photographs."""
    coarse_hwc = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse_hwc).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """Two classes of four pictures; a copy, a small one, a recompressed one, blank and broken files."""
    root = tmp_path_factory.mktemp("dataset")
    lines = ["file,label,split"]

    def add(name: str, label: str, split: str) -> Path:
        lines.append(f"{name},{label},{split}")
        return root / name

    for i in range(8):
        label, split = (TENNIS, AUTO)[i % 2], ("train", "train", "validation", "test")[i // 2]
        photo(i).save(add(f"{i}.png", label, split))
    add("same.png", AUTO, "train").write_bytes((root / "0.png").read_bytes())
    photo(1).resize((48, 36)).save(add("small.png", AUTO, "test"))
    photo(2).save(add("again.jpg", TENNIS, "train"), quality=40)
    for i in range(2):
        Image.new("RGB", (300, 260), (250, 250, 250 - i)).save(add(f"blank{i}.png", TENNIS, "train"))
    add("cut.png", TENNIS, "train").write_bytes((root / "4.png").read_bytes()[:400])
    add("text.jpg", AUTO, "test").write_text("hello")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root / "labels.csv"


@pytest.fixture(scope="module")
def inspected(table, tmp_path_factory) -> tuple[dict, str]:
    output = tmp_path_factory.mktemp("inspection")
    assert inspect_dataset.run(InspectConfig(dataset=str(table), output=str(output))) == 0
    return json.loads((output / page.DATA_FILE).read_text()), (output / page.PAGE_FILE).read_text()


def test_images_are_counted_by_class_and_split(inspected):
    found, _ = inspected
    assert found["images"] == {"train": 9, "validation": 2, "test": 4}
    by_path = {one["path"]: one["images"] for one in found["classes"]}
    assert by_path == {
        TENNIS: {"train": 6, "validation": 1, "test": 1},
        AUTO: {"train": 3, "validation": 1, "test": 3},
    }
    assert found["formats"] == {"png": 12, "jpeg": 1}
    assert found["sizes"]["width"] == {"min": 48, "5 %": 96, "median": 96, "95 %": 300, "max": 300}
    assert found["small"] == 11


def test_unreadable_images_are_listed_with_their_reasons(inspected):
    found, _ = inspected
    reasons = {Path(one["uri"]).name: (one["status"], one["label"]) for one in found["unreadable"]}
    assert reasons == {"cut.png": ("truncated", TENNIS), "text.jpg": ("not_an_image", AUTO)}


def test_copies_are_found_by_bytes_and_by_looks_and_the_serious_ones_come_first(inspected):
    found, _ = inspected
    names = [
        (sorted(Path(uri).name for uri in one["uris"]), one["exact"], len(one["splits"]), len(one["labels"]))
        for one in found["duplicates"]
    ]
    assert names == [
        (["0.png", "same.png"], True, 1, 2),
        (["1.png", "small.png"], False, 2, 1),
        (["2.png", "again.jpg"], False, 1, 1),
    ]


def test_what_should_be_mended_is_said_in_words(inspected):
    found, text = inspected
    assert found["warnings"] == [
        "2 of 15 images cannot be read: 1 truncated, 1 not_an_image.",
        "1 picture is in several splits: what is measured there will be too good.",
        "1 picture has different labels in different places.",
    ]
    assert all(warning in text for warning in found["warnings"])


class Pictures(html.parser.HTMLParser):
    """Where the images of a page come from."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_page_needs_nothing_else_and_shows_every_class(inspected):
    _, text = inspected
    sources = Pictures(text).sources
    assert all(source.startswith(("data:image/", "#")) for source in sources)
    readable, in_groups = 13, 6
    assert sum(source.startswith("data:image/jpeg") for source in sources) == readable + in_groups


def test_hostile_labels_stay_text(tmp_path):
    photo(0).save(tmp_path / "a.png")
    photo(1).save(tmp_path / "b.png")
    (tmp_path / "labels.csv").write_text('file,label\na.png,"<script>x</script>"\nb.png,b\n')
    data = dataset.load(DataSettings(str(tmp_path / "labels.csv"), taxonomy="labels"))
    found, images = inspect.inspect_dataset(data, threads=1)
    assert "<script>" not in page.render(found, data, images)


def test_dataset_that_cannot_be_learned_from_is_shown_with_a_warning(tmp_path):
    photo(0).save(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("file,label,split\na.png,483,test\n")
    data = dataset.load(DataSettings(str(tmp_path / "labels.csv")))
    found, images = inspect.inspect_dataset(data, threads=1)
    assert "needs at least 2" in found.warnings[0]
    assert "Sports" in page.render(found, data, images)


def test_dataset_without_one_readable_image_is_shown(tmp_path):
    (tmp_path / "labels.csv").write_text("file,label\na.png,483\nb.png,1\n")
    data = dataset.load(DataSettings(str(tmp_path / "labels.csv")))
    found, images = inspect.inspect_dataset(data, threads=1)
    assert [one["status"] for one in found.unreadable] == ["not_found", "not_found"]
    assert "not_found" in page.render(found, data, images)


def test_unknown_labels_are_refused_with_a_way_to_look_all_the_same(tmp_path):
    photo(0).save(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("file,label\na.png,no such thing\n")
    config = InspectConfig(dataset=str(tmp_path / "labels.csv"), output=str(tmp_path / "out"))
    with pytest.raises(InputError, match="--taxonomy labels"):
        inspect_dataset.run(config)


def test_hash_survives_another_size_and_quality_and_tells_pictures_apart():
    spec = duplicates.HASHED
    pictures = [photo(i, (320, 240)) for i in range(40)]
    smaller = [one.resize((97, 61), Image.Resampling.LANCZOS) for one in pictures]
    pixels_nhwc = np.stack(
        [np.asarray(one.resize((spec.width, spec.height))) for one in (*pictures, *smaller)]
    )
    hashes, structured = duplicates.hash_pictures(pixels_nhwc)
    assert structured.all()
    groups = duplicates.group_alike(hashes)
    assert (groups[:40] == groups[40:]).all()
    assert len(set(groups.tolist())) == 40


def test_pictures_are_alike_through_others():
    hashes = np.array([0b0, 0b11, 0b1111, 0b1111 << 40], np.uint64)
    assert duplicates.group_alike(hashes, 2).tolist() == [0, 0, 0, 1]
    assert duplicates.group_alike(hashes, 0).tolist() == [0, 1, 2, 3]
    assert duplicates.group_alike(hashes[:0]).tolist() == []
