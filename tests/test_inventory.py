"""Inventories of every form become plans in which each row is found again, once."""

import csv
from pathlib import Path

import pytest

from pipelines.inventory import plan
from pipelines.listing import InventoryError
from pipelines.plan import PlanMismatch, open_plan
from pipelines.specs import InventoryOptions
from pipelines.storage import Storage, open_storage


@pytest.fixture
def state(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "state"))


def rows_of(state: Storage) -> list[dict]:
    """The plan's rows as the caller would see them again: uri, image_id, carried columns."""
    frozen = open_plan(state)
    items = frozen.read(0, frozen.n_items).to_pylist()
    assert [item["row_id"] for item in items] == list(range(frozen.n_items))
    return [{"uri": item["uri"], **row} for item in items for row in item["rows"]]


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_folder_of_photos_lists_every_image_and_nothing_else(photos: Path, state: Storage) -> None:
    frozen = plan(str(photos), state)
    uris = [row["uri"] for row in rows_of(state)]
    assert frozen.n_items == frozen.n_rows == len(set(uris)) == len(list(photos.glob("*/*.jpg")))
    assert sum("/_none/" in uri for uri in uris) == 453
    assert not [uri for uri in uris if uri.endswith(".csv")]


def test_csv_values_come_back_as_they_were_written(tmp_path: Path, state: Storage) -> None:
    rows = [
        {"uri": "https://a.example/1.jpg", "publisher_id": "007", "note": 'a "quoted", two\nline note'},
        {"uri": "https://a.example/2.jpg", "publisher_id": "", "note": "NULL"},
    ]
    plan(str(write_csv(tmp_path / "inventory.csv", rows)), state)
    assert rows_of(state) == [row | {"image_id": row["uri"]} for row in rows]


def test_rows_of_one_uri_share_an_item_and_keep_their_own_columns(tmp_path: Path, state: Storage) -> None:
    rows = [{"uri": f"s3://b/{n % 3}.jpg", "image_id": f"i{n}", "page": f"p{n}"} for n in range(10)]
    frozen = plan(str(write_csv(tmp_path / "inventory.csv", rows)), state)
    assert (frozen.n_items, frozen.n_rows) == (3, 10)
    assert sorted(rows_of(state), key=lambda row: row["page"]) == rows


def test_missing_uris_keep_their_rows(tmp_path: Path, state: Storage) -> None:
    (tmp_path / "inventory.jsonl").write_text(
        '{"uri": null, "n": 1}\n{"n": 2}\n{"uri": "", "n": 3}\n{"uri": "x", "n": 4}\n'
    )
    plan(str(tmp_path / "inventory.jsonl"), state)
    assert [(row["uri"], row["n"]) for row in rows_of(state)] == [("", 1), ("", 2), ("", 3), ("x", 4)]


def test_relative_uri_is_kept_and_located_beside_its_table(tmp_path: Path, state: Storage) -> None:
    write_csv(tmp_path / "inventory.csv", [{"uri": "photos/a b.jpg"}, {"uri": "/abs/c.jpg"}, {"uri": ""}])
    frozen = plan(str(tmp_path / "inventory.csv"), state)
    items = frozen.read(0, 3, ["uri", "container"]).to_pylist()
    assert items[0] == {"uri": "photos/a b.jpg", "container": f"{tmp_path}/photos/a b.jpg"}
    assert [item["container"] for item in items[1:]] == [None, None]


@pytest.mark.parametrize("name", ["status", "Labels"])
def test_carried_column_that_takes_our_name_is_refused_with_the_remedy(
    tmp_path: Path, state: Storage, name: str
) -> None:
    table = str(write_csv(tmp_path / "inventory.csv", [{"uri": "a.jpg", name: "x"}]))
    with pytest.raises(InventoryError, match=f"--rename {name}=source_{name} or --drop-columns {name}"):
        plan(table, state)
    plan(table, state, options=InventoryOptions(rename=(f"{name}=mine",)))
    assert rows_of(state)[0]["mine"] == "x"


def test_changed_inventory_is_refused_unless_the_frozen_plan_is_kept(tmp_path: Path, state: Storage) -> None:
    table = write_csv(tmp_path / "inventory.csv", [{"uri": "a.jpg"}])
    first = plan(str(table), state)
    assert plan(str(table), state) == first
    write_csv(table, [{"uri": "a.jpg"}, {"uri": "b.jpg"}])
    with pytest.raises(PlanMismatch, match="--keep-plan"):
        plan(str(table), state)
    assert plan(str(table), state, options=InventoryOptions(keep_plan=True)) == first
