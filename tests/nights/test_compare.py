"""Two predictions of the same images are compared by their bytes, by category, and against the truth."""

import json
from pathlib import Path

import pytest

from jobs.cli import main
from pipelines.nights.compare import Side, choose_flips, compare, open_sides
from pipelines.nights.page import flip_matrix
from pipelines.storage.storage import open_storage
from tests.builders.models import dataset, small_bundle
from tests.nights.tables import TREE, row, write_rows

SPORTS, FOOD, SAILING = "483", "210", "530"


def side(folder: Path, rows: list[dict[str, object]]) -> Side:
    return Side(folder.name, open_storage(str(folder)), [write_rows(folder, rows)])


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Side, Side]:
    """Ten images in common, of which two flip; copies, a failure, and images of one side only."""
    a = [row(at, SPORTS) for at in range(8)] + [row(8, FOOD), row(9, FOOD), row(10, FOOD), row(11, None)]
    b = [row(at, SPORTS, uri=f"moved/{at}") for at in range(7)] + [row(0, SPORTS, image_id="copy")]
    b += [
        row(7, FOOD, top_score=0.99),
        row(8, FOOD, cat=[]),
        row(9, SAILING),
        row(11, SPORTS),
        row(12, SPORTS),
    ]
    return side(tmp_path / "a", a), side(tmp_path / "b", b)


def test_flips_are_counted_by_category_once_per_image(sides):
    with open_sides(*sides) as database:
        found = compare(database, TREE, {})
    assert (found["images"], found["flips"], found["only_a"], found["only_b"]) == (10, 2, 1, 2)
    assert (found["flip_share"], found["tier1_flips"], found["cat_changes"]) == (0.2, 2, 3)
    sports = next(one for one in found["categories"] if one["id"] == SPORTS)
    assert (sports["a"], sports["b"], sports["lost"], sports["gained"]) == (8, 7, 1, 0)
    assert found["pairs"] == [
        {"a": "Food & Drink", "b": TREE.path(SAILING), "images": 1},
        {"a": "Sports", "b": "Food & Drink", "images": 1},
    ]


def test_truth_says_which_side_is_right(sides):
    truth = {row(7, None)["uri"]: [FOOD], row(8, None)["uri"]: [FOOD], row(9, None)["uri"]: [SAILING]}
    with open_sides(*sides) as database:
        found = compare(database, TREE, truth)["truth"]
        assert compare(database, TREE, {"elsewhere": [FOOD]})["truth"] is None
    assert (found["images"], found["accuracy_a"], found["accuracy_b"]) == (3, pytest.approx(1 / 3), 1.0)
    assert (found["only_a_right"], found["only_b_right"], found["p"]) == (0, 2, 0.5)


def test_surest_flips_are_shown(sides):
    with open_sides(*sides) as database:
        flips = choose_flips(database, 1)
    assert len(flips) == 1
    assert flips[0].a[0][0] != flips[0].b[0][0]


def test_matrix_holds_the_categories_that_flip_most():
    pairs = [{"a": f"c{at}", "b": "other", "images": 30 - at} for at in range(30)]
    matrix = flip_matrix(pairs)
    assert len(matrix["names"]) == 20
    assert matrix["most"] == 30


def write_night(folder: Path, rows: list[dict[str, object]], *, listed: bool) -> Path:
    name = write_rows(folder, rows, "part-00000-g2.parquet")
    write_rows(folder, [row(at, FOOD) for at in range(100)], "part-00000-g1.parquet")
    manifest = {"format_version": 1, "generation": 2, "files": [{"name": name, "rows": 2, "sha256": ""}]}
    (folder / "_SUCCESS").write_text(json.dumps(manifest) if listed else "")
    return folder


def test_nights_are_read_as_their_manifests_list_them_and_the_gate_refuses(tmp_path, capsys):
    first = write_night(tmp_path / "n" / "run_date=2026-11-20", [row(0, FOOD), row(1, FOOD)], listed=True)
    second = write_night(tmp_path / "n" / "run_date=2026-11-21", [row(0, FOOD), row(1, SPORTS)], listed=True)
    command = ["compare", str(first), str(second), "--output", str(tmp_path / "out")]
    assert main([*command, "--max-flips", "0.5"]) == 0
    assert main([*command, "--max-flips", "0.4"]) == 3
    assert "1 of 2 labels differ" in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["flip_share"] == 0.5
    assert "Food &amp; Drink" in (tmp_path / "out" / "report.html").read_text()


def test_bundles_are_compared_over_a_labelled_sample(tmp_path, capsys):
    small_bundle(tmp_path / "one")
    pictures = dataset(tmp_path / "pictures", 10)
    command = ["compare", str(tmp_path / "one"), str(tmp_path / "one"), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "give --images" in capsys.readouterr().err
    assert main([*command, "--images", str(pictures), "--sample", "8", "--max-flips", "0"]) == 0
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert (found["images"], found["flips"]) == (8, 0)
    assert found["truth"]["images"] == 8


def test_what_is_neither_bundle_nor_predictions_is_refused(tmp_path, capsys):
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 2
    assert "neither manifest.json nor _SUCCESS" in capsys.readouterr().err
