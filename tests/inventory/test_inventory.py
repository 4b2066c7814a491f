"""Inventories of every form become plans in which each row is found again, once."""

import csv
import gzip
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable, Iterable
from decimal import Decimal
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.fetch.fetch import Fetcher
from pipelines.fetch.settings import FetchLimits
from pipelines.fetch.source import sources_of
from pipelines.inventory import dedupe, shards, tables
from pipelines.inventory import plan as frozen_plan
from pipelines.inventory.inventory import plan
from pipelines.inventory.plan import open_plan
from pipelines.inventory.settings import InventoryOptions
from pipelines.messages import InputError
from pipelines.status import Status
from pipelines.storage.local import LocalStorage
from pipelines.storage.storage import Storage, open_storage
from pipelines.storage.uris import StorageError
from tests.builders.etag_server import EtagServer
from tests.builders.mutations import mutations

N_DAMAGED = 40


@pytest.fixture
def state(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "state"))


def rows_of(state: Storage) -> list[dict]:
    """The plan's rows as the caller would see them again: uri, image_id, carried columns."""
    frozen = open_plan(state)
    items = frozen.read(0, frozen.n_items).to_pylist()
    assert [item["item_id"] for item in items] == list(range(frozen.n_items))
    return [{"uri": item["uri"], **row} for item in items for row in item["table_rows"]]


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
        {"uri": "2024-01-01", "publisher_id": "1e5", "note": "2024-01-01T00:00:00+02:00"},
        {"uri": "12", "publisher_id": " true ", "note": "NaN"},
    ]
    plan(str(write_csv(tmp_path / "inventory.csv", rows)), state)
    assert rows_of(state) == [row | {"image_id": row["uri"]} for row in rows]


def test_rows_of_one_uri_share_an_item_and_keep_their_own_columns(tmp_path: Path, state: Storage) -> None:
    rows = [{"uri": f"https://b/{n % 3}.jpg", "image_id": f"i{n}", "page": f"p{n}"} for n in range(10)]
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
    frozen = plan(str(tmp_path / "inventory.csv"), state, allowed=["/abs"])
    items = frozen.read(0, 3, ["uri", "container"]).to_pylist()
    assert items[0] == {"uri": "photos/a b.jpg", "container": f"{tmp_path}/photos/a b.jpg"}
    assert [item["container"] for item in items[1:]] == [None, None]


def test_name_with_a_colon_or_tilde_is_a_file_beside_its_table(tmp_path: Path, state: Storage) -> None:
    names = ["shot:1.png", "a:b.png", "~tilde.png"]
    for name in names:
        (tmp_path / name).write_bytes(b"image")
    pq.write_table(pa.table({"uri": names}), tmp_path / "inventory.parquet")
    frozen = plan(str(tmp_path / "inventory.parquet"), state)
    with Fetcher() as fetcher:
        found = dict(fetcher.fetch_many(sources_of(frozen.items([(0, 3)]))))
    assert [found[number].payload for number in range(3)] == [b"image"] * 3


def test_table_of_images_elsewhere_is_refused_with_the_flag_before_anything_is_written(
    tmp_path: Path, state: Storage
) -> None:
    uris = [f"/mnt/photos/{n % 9}/{n}.jpg" for n in range(30)] + [f"S3A://shop/{n}.jpg" for n in range(12)]
    uris += [f"https://a.example/{n}.jpg" for n in range(58)]
    pq.write_table(pa.table({"uri": uris}), tmp_path / "inventory.parquet")
    with pytest.raises(
        InputError, match=r"42 of 100 rows .* 30 in /mnt/photos/, 12 in s3://shop/\."
    ) as refused:
        plan(str(tmp_path / "inventory.parquet"), state)
    assert state.list() == []
    allowed = str(refused.value).partition("--fetch.allow ")[2].split(",")
    assert plan(str(tmp_path / "inventory.parquet"), state, allowed=allowed).n_rows == 100


def test_a_few_rows_elsewhere_do_not_refuse_the_table(tmp_path: Path, state: Storage) -> None:
    uris = ["/etc/passwd", "../x.jpg", *(f"{n}.jpg" for n in range(30)), "data:x", "", "//cdn.example/a.jpg"]
    pq.write_table(pa.table({"uri": uris}), tmp_path / "inventory.parquet")
    assert plan(str(tmp_path / "inventory.parquet"), state).n_rows == 35


def test_white_space_around_a_url_does_not_make_it_relative(tmp_path: Path, state: Storage) -> None:
    uris = [" https://a.example/1.jpg", "\ts3://b/2.jpg\n", "\u00a0https://a.example/3.jpg ", " ", " 4.jpg"]
    pq.write_table(pa.table({"uri": uris}), tmp_path / "inventory.parquet")
    frozen = plan(str(tmp_path / "inventory.parquet"), state, allowed=["s3://b/"])
    items = frozen.read(0, 5, ["uri", "container"])
    assert items["uri"].to_pylist() == uris
    assert items["container"].to_pylist() == [None] * 4 + [f"{tmp_path}/ 4.jpg"]


@pytest.mark.parametrize("name", ["status", "Labels", "__item_id"])
def test_carried_column_that_takes_our_name_is_refused_with_the_remedy(
    tmp_path: Path, state: Storage, name: str
) -> None:
    table = str(write_csv(tmp_path / "inventory.csv", [{"uri": "a.jpg", name: "x"}]))
    with pytest.raises(InputError, match=f"--rename {name}=source_{name} or --drop-columns {name}"):
        plan(table, state)
    plan(table, state, options=InventoryOptions(rename={name: "mine"}))
    assert rows_of(state)[0]["mine"] == "x"


def test_a_plan_of_an_earlier_version_is_refused_by_name(tmp_path: Path, state: Storage) -> None:
    state.put("plan/plan.json", json.dumps({"format_version": 1, "n_items": 3}).encode())
    with pytest.raises(InputError, match=r"plan of format 1, .* reads format 4\..*another output folder"):
        open_plan(state)


def test_changed_inventory_is_refused_unless_the_frozen_plan_is_kept(tmp_path: Path, state: Storage) -> None:
    table = write_csv(tmp_path / "inventory.csv", [{"uri": "a.jpg"}])
    first = plan(str(table), state)
    assert plan(str(table), state) == first
    write_csv(table, [{"uri": "a.jpg"}, {"uri": "b.jpg"}])
    with pytest.raises(InputError, match="--keep-plan"):
        plan(str(table), state)
    assert plan(str(table), state, options=InventoryOptions(keep_plan=True)) == first


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_kept_plan_is_refused_where_a_file_of_many_images_has_changed(
    tmp_path: Path, state: Storage, form: str
) -> None:
    """By its place, image B would be fetched for the row of image A."""

    def write(name: str, images: Iterable[str]) -> None:
        if form == "tar":
            shard(folder / f"{name}.tar", [f"{image}.jpg" for image in images])
        else:
            rows = {"image_id": list(images), "image": [image.encode() for image in images]}
            pq.write_table(pa.table(rows), folder / f"{name}.parquet")

    folder = tmp_path / "inventory"
    folder.mkdir()
    write("one", "ab")
    frozen = plan(str(folder), state)
    keep = InventoryOptions(keep_plan=True)
    write("two", "cd")
    assert plan(str(folder), state, options=keep) == frozen
    write("one", "ba")
    with pytest.raises(InputError, match=r"one\.(tar|parquet) has changed .*1 of 1 files.*another output"):
        plan(str(folder), state, options=keep)


def test_plan_of_a_shards_images_is_not_that_of_all_its_files(tmp_path: Path, state: Storage) -> None:
    path = str(shard(tmp_path / "shard.tar", ["a.jpg", "a.json"]))
    assert plan(path, state).n_items == 1
    everything = InventoryOptions(inventory_type="tars", all_files=True)
    with pytest.raises(InputError):
        plan(path, state, options=everything)
    assert plan(path, open_storage(str(tmp_path / "other")), options=everything).n_items == 2


ANY_TYPE = {
    "dictionary": pa.array(["a", None, "a"]).dictionary_encode(),
    "decimal": pa.array([Decimal("1.10"), None, Decimal("2.00")], pa.decimal128(9, 2)),
    "moment": pa.array([1, None, 3], pa.timestamp("ns", tz="Europe/Berlin")),
    "day": pa.array([1, None, 3], pa.date32()),
    "time": pa.array([1, None, 3], pa.time64("us")),
    "duration": pa.array([1, None, 3], pa.duration("ms")),
    "map": pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int64())),
    "list": pa.array([[1, None], None, []], pa.large_list(pa.int32())),
    "pair": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int16(), 2)),
    "struct": pa.array([{"x": 1, "y": ["a"]}, None, {"x": None, "y": []}]),
    "binary": pa.array([b"\xff", None, b""], pa.binary()),
    "fixed": pa.array([b"ab", None, b"cd"], pa.binary(2)),
    "half": pa.array([1.5, None, 2.5], pa.float16()),
    "large": pa.array(["a", None, "c"], pa.large_string()),
    "unsigned": pa.array([2**64 - 1, None, 0], pa.uint64()),
    "nothing": pa.nulls(3),
}


def test_carried_columns_of_any_arrow_type_come_back_as_given(tmp_path: Path, state: Storage) -> None:
    table = pa.table({"uri": ["a", "b", "a"], **ANY_TYPE})
    pq.write_table(table, tmp_path / "inventory.parquet")
    frozen = plan(str(tmp_path / "inventory.parquet"), state)
    assert frozen.carried == table.drop_columns(["uri"]).schema
    rows = frozen.read(0, 2)["table_rows"].combine_chunks().flatten()
    given = table.take([0, 2, 1])  # rows 0 and 2 share an item
    for index, field in enumerate(frozen.carried):
        assert rows.field(index + 1).equals(given[field.name].combine_chunks()), field


def test_uuid_and_json_columns_are_carried_as_they_are_stored(tmp_path: Path, state: Storage) -> None:
    """An extension type would fail in the first part that is written, after its images were classified."""
    columns = "'a' AS uri, 'c'::UUID AS id, '{}'::JSON AS j, {'id': 'c'::UUID} AS s, ['c'::UUID] AS l"
    columns = columns.replace("'c'", "'01234567-0123-0123-0123-0123456789ab'")
    duckdb.sql(f"COPY (SELECT {columns}) TO '{tmp_path}/by-duckdb.parquet'")
    uuids = pa.array([bytes(16)], pa.uuid())
    kinds = pa.StructArray.from_arrays([pa.array(["k"]).dictionary_encode(), uuids], ["kind", "id"])
    pq.write_table(pa.table({"uri": ["a"], "i": uuids, "k": kinds}), tmp_path / "by-pyarrow.parquet")
    frozen = plan(str(tmp_path), state)
    written = pa.BufferOutputStream()
    pq.write_table(frozen.items([(0, 1)], None), written)
    by_duckdb, by_pyarrow = rows_of(state)
    assert by_duckdb["id"] == by_duckdb["s"]["id"] == by_duckdb["l"][0]
    assert (by_duckdb["id"].hex(), by_duckdb["j"]) == ("0123456701230123" + "01230123456789ab", "{}")
    assert (by_pyarrow["i"], by_pyarrow["k"]) == (bytes(16), {"kind": "k", "id": bytes(16)})


def test_string_view_is_carried_as_text(tmp_path: Path, state: Storage) -> None:
    table = pa.table({"uri": pa.array(["a"], pa.string_view()), "page": pa.array(["p"], pa.string_view())})
    pq.write_table(table, tmp_path / "inventory.parquet")
    plan(str(tmp_path / "inventory.parquet"), state)
    assert rows_of(state) == [{"uri": "a", "image_id": "a", "page": "p"}]


def test_whole_numbers_serve_as_image_ids(tmp_path: Path, state: Storage) -> None:
    (tmp_path / "inventory.jsonl").write_text('{"uri": "a", "image_id": 7}\n{"uri": "b", "image_id": null}\n')
    plan(str(tmp_path / "inventory.jsonl"), state)
    assert [row["image_id"] for row in rows_of(state)] == ["7", "b"]


def test_json_lines_take_their_types_from_the_whole_file(
    tmp_path: Path, state: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column that is whole numbers at first and fractions a block later must not break off half-way."""
    monkeypatch.setattr(tables, "BLOCK_BYTES", 64)
    lines = [f'{{"uri": "u{n}", "score": {n if n < 20 else n + 0.5}}}' for n in range(40)]
    (tmp_path / "inventory.ndjson.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    plan(str(tmp_path / "inventory.ndjson.gz"), state)
    assert [row["score"] for row in rows_of(state)] == [n if n < 20 else n + 0.5 for n in range(40)]


def test_json_text_that_reads_as_a_moment_stays_text(
    tmp_path: Path, state: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a later block says that it was text all along."""
    monkeypatch.setattr(tables, "BLOCK_BYTES", 400)
    moment = "2024-01-01T00:00:00+02:00"
    nested = {"seen": [moment, "2024-01-02"], "deep": [{"day": "2024-01-03"}]}
    given = [
        {
            "uri": f"u{n}",
            "image_id": f"2024-01-{n + 1:02}",
            "at": moment,
            "note": "2024-01-01",
            "more": nested,
        }
        for n in range(9)
    ]
    given.append({"uri": "last", "image_id": "x", "at": moment, "note": "no date", "more": nested})
    (tmp_path / "inventory.jsonl").write_text("\n".join(json.dumps(row) for row in given))
    plan(str(tmp_path / "inventory.jsonl"), state)
    assert rows_of(state) == given


def test_folder_of_tables_is_one_inventory_with_the_columns_of_all(tmp_path: Path, state: Storage) -> None:
    folder = tmp_path / "tables"
    (folder / "_done").mkdir(parents=True)
    pq.write_table(pa.table({"uri": ["a"], "n": pa.array([1], pa.int32())}), folder / "0.parquet")
    pq.write_table(pa.table({"n": pa.array([2**40]), "uri": ["b"], "m": ["x"]}), folder / "1.parquet")
    (folder / "_SUCCESS").touch()
    plan(str(folder), state)
    assert [(row["uri"], row["n"], row["m"]) for row in rows_of(state)] == [("a", 1, None), ("b", 2**40, "x")]


def test_folder_whose_second_table_repeats_the_first_is_planned(tmp_path: Path, state: Storage) -> None:
    pq.write_table(pa.table({"uri": ["a", "b"]}), tmp_path / "mon.parquet")
    pq.write_table(pa.table({"uri": ["b", "a"]}), tmp_path / "tue.parquet")
    frozen = plan(str(tmp_path), state)
    assert (frozen.n_items, frozen.n_rows) == (2, 4)
    assert [row["uri"] for row in rows_of(state)] == ["a", "a", "b", "b"]


def test_batch_of_repeated_uris_alone_is_planned(tmp_path: Path, state: Storage) -> None:
    uris = [f"https://a.example/{n}.jpg" for n in range(tables.BATCH_ROWS)]
    pq.write_table(pa.table({"uri": uris + uris}), tmp_path / "inventory.parquet")
    frozen = plan(str(tmp_path / "inventory.parquet"), state)
    assert (frozen.n_items, frozen.n_rows) == (len(uris), 2 * len(uris))
    assert frozen.read(0, frozen.n_items, ["uri"])["uri"].to_pylist() == uris


def test_shard_without_images_is_a_plan_without_items(tmp_path: Path, state: Storage) -> None:
    tarfile.open(tmp_path / "shard.tar", "w").close()
    assert plan(str(tmp_path / "shard.tar"), state).n_items == 0


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE])
def test_image_without_bytes_of_its_own_in_a_shard_is_refused(
    tmp_path: Path, state: Storage, kind: bytes
) -> None:
    path = shard(tmp_path / "shard.tar", ["a.jpg"])
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("b.jpg")
        member.type, member.linkname = kind, "a.jpg"
        tar.addfile(member)
    with pytest.raises(InputError, match=r"shard\.tar holds b\.jpg as a link.*--hard-dereference"):
        plan(str(path), state)


def test_image_in_a_shard_whose_name_is_not_utf8_is_refused_by_name(tmp_path: Path, state: Storage) -> None:
    path = shard(tmp_path / "shard.tar", ["a.jpg", "b\udce9.jpg"])
    with pytest.raises(InputError, match=r"shard\.tar holds a member .*'b\\udce9\.jpg'"):
        plan(str(path), state)


def shard(path: Path, names: Iterable[str]) -> Path:
    """A tar of files of 700 bytes, so that header n is at byte 1536 * n."""
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 700
            tar.addfile(member, io.BytesIO(os.fsencode(name).ljust(700, b".")))
    return path


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        (
            lambda tar: tar[: 4 * 1536] + bytes([tar[4 * 1536] ^ 1]) + tar[4 * 1536 + 1 :],
            r"3\.jpg.*6,144.*damaged",
        ),
        (lambda tar: tar[: 4 * 1536] + bytes(512) + tar[4 * 1536 + 512 :], r"3\.jpg.*damaged"),
        (lambda tar: tar[: 4 * 1536], r"3\.jpg.*was cut"),
        (lambda tar: tar[: 4 * 1536 + 100], r"3\.jpg.*damaged"),
        (lambda tar: tar[: 4 * 1536 + 512], r"4\.jpg"),
        (lambda tar: tar[: 10 * 1536], r"9\.jpg.*was cut"),
        (lambda tar: tar + b"what is this", r"9\.jpg.*damaged"),
        (lambda tar: tar[:-1] + b"x" + tar[:-1], r"9\.jpg.*damaged"),
    ],
)
def test_damaged_shard_is_refused_at_its_last_good_member(
    tmp_path: Path, state: Storage, damage: Callable[[bytes], bytes], place: str
) -> None:
    path = shard(tmp_path / "shard.tar", [f"{n}.jpg" for n in range(10)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        InputError, match=rf"shard\.tar cannot be read as a tar at or after the member {place}"
    ):
        plan(str(path), state)


def test_tars_put_together_into_one_file_are_read_to_the_end(tmp_path: Path, state: Storage) -> None:
    tars = [shard(tmp_path / f"{part}.tar", [f"{part}{n}.jpg" for n in range(3)]) for part in "ab"]
    whole = tmp_path / "whole.tar"
    whole.write_bytes(b"".join(tar.read_bytes() for tar in tars) + bytes(512))
    frozen = plan(str(whole), state)
    assert [row["key"] for row in rows_of(state)] == ["a0", "a1", "a2", "b0", "b1", "b2"]
    fetcher = Fetcher()
    fetched = dict(fetcher.fetch_many(sources_of(frozen.items([(0, 6)]))))
    fetcher.close()
    assert [(fetched[n].payload or b"")[:6] for n in (2, 5)] == [b"a2.jpg", b"b2.jpg"]


def test_carried_columns_may_be_called_what_the_plan_calls_its_own(tmp_path: Path, state: Storage) -> None:
    """They have no effect: what is fetched is what is at the row's URI."""
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 9)
    own: dict[str, object] = {
        "item_id": "r", "container": "/etc/hostname", "offset": 1, "length": 2, "payload_column": "x",
        "rows": [3], "leader": "l", "payload": b"y", "key": "k", ".a": 4, "a.b": 5, "": 6,
    }  # fmt: skip
    given = [{"uri": str(tmp_path / name), "image_id": f"{n}", **own} for n, name in enumerate("abab")]
    pq.write_table(pa.Table.from_pylist(given), tmp_path / "inventory.parquet")
    frozen = plan(str(tmp_path / "inventory.parquet"), state)
    assert sorted(rows_of(state), key=lambda row: row["image_id"]) == given
    fetcher = Fetcher()
    fetched = dict(fetcher.fetch_many(sources_of(frozen.items([(0, 2)]))))
    fetcher.close()
    assert [fetched[n].payload for n in range(2)] == [b"a" * 9, b"b" * 9]


def test_images_in_a_table_keep_columns_called_what_the_plan_calls_its_own(
    tmp_path: Path, state: Storage
) -> None:
    given = {"container": ["/etc/hostname"] * 2, "offset": [7, 8], "payload_column": ["x", "y"]}
    pq.write_table(pa.table({"image": [b"one", b"two"], **given}), tmp_path / "inventory.parquet")
    frozen = plan(str(tmp_path / "inventory.parquet"), state)
    assert [{name: row[name] for name in given} for row in rows_of(state)] == pa.table(given).to_pylist()
    fetcher = Fetcher()
    fetched = dict(fetcher.fetch_many(sources_of(frozen.items([(0, 2)]))))
    fetcher.close()
    assert [fetched[n].payload for n in range(2)] == [b"one", b"two"]


@pytest.mark.parametrize(
    ("options", "carried"),
    [
        (InventoryOptions(), {"image_path": "mine"}),
        (InventoryOptions(rename={"image_path": "x"}), {"x": "mine"}),
        (InventoryOptions(drop_columns=("image_path",)), {}),
    ],
)
def test_column_called_like_the_path_beside_an_image_is_the_callers(
    tmp_path: Path, state: Storage, options: InventoryOptions, carried: dict[str, str]
) -> None:
    images = pa.array([{"bytes": b"one", "path": "1.jpg"}])
    pq.write_table(pa.table({"image": images, "image_path": ["mine"]}), tmp_path / "inventory.parquet")
    uri = f"{tmp_path}/inventory.parquet#0"
    plan(str(tmp_path / "inventory.parquet"), state, options=options)
    assert rows_of(state) == [{"uri": uri, "image_id": uri, **carried}]


def test_table_without_rows_is_a_plan_without_items(tmp_path: Path, state: Storage) -> None:
    (tmp_path / "inventory.csv").write_text("uri,n\n")
    frozen = plan(str(tmp_path / "inventory.csv"), state)
    assert (frozen.n_items, frozen.n_rows, frozen.read(0, 0).num_rows) == (0, 0, 0)


def test_spreadsheet_export_with_byte_order_mark_and_crlf_is_read(tmp_path: Path, state: Storage) -> None:
    (tmp_path / "inventory.csv").write_bytes(b"\xef\xbb\xbfuri,n\r\na.jpg,1\r\n\r\nb.jpg,2\r\n")
    plan(str(tmp_path / "inventory.csv"), state)
    assert [(row["uri"], row["n"]) for row in rows_of(state)] == [("a.jpg", "1"), ("b.jpg", "2")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no_uri.csv", "file,n\na,1\n", "--rename COLUMN=uri"),
        ("twice.csv", "uri,n,n\na,1,2\n", "names a column twice: n"),
        ("ragged.csv", "uri,n\na,1\nb\n", "ragged.csv"),
        ("latin.csv", b"uri\n\xe9.jpg\n", "UTF8"),
        ("broken.jsonl", '{"uri": "a"}\n{"uri": \n', "broken.jsonl"),
        ("mixed.jsonl", '{"uri": "a", "n": 1}\n{"uri": "b", "n": {"x": 1}}\n', "mixed.jsonl"),
        ("number.jsonl", '{"uri": 1}\n', "uri must be text"),
        ("not.parquet", "PAR1 this is none", "not.parquet"),
        ("empty.csv", "", "empty.csv"),
        ("shard.tar", b"x" * 1024, "shard.tar"),
    ],
)
def test_unusable_inventory_is_refused_by_name(
    tmp_path: Path, state: Storage, name: str, content: str | bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=message):
        plan(str(tmp_path / name), state)
    assert state.list() == []


def test_place_without_images_is_refused_with_what_it_holds(tmp_path: Path, state: Storage) -> None:
    with pytest.raises(InputError, match="does not exist or holds no file"):
        plan(str(tmp_path / "nowhere"), state)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"notes\.txt.*--all-files"):
        plan(str(tmp_path), state)
    assert plan(str(tmp_path), state, options=InventoryOptions(all_files=True)).n_items == 1


def test_listing_takes_images_by_name_in_any_case_and_skips_hidden_ones(
    tmp_path: Path, state: Storage
) -> None:
    folder = tmp_path / "images"
    for name in ("b.JPG", "a/c.webp", "a/._c.webp", ".cache/d.jpg", "labels.csv", "e", "f.jpeg.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    Path(os.fsdecode(bytes(folder) + b"/\xff.png")).touch()
    frozen = plan(str(folder), state)
    uris = [row["uri"] for row in rows_of(state)]
    assert sorted(uris) == sorted([f"{folder}/a/c.webp", f"{folder}/b.JPG", f"file://{folder}/%FF.png"])
    assert frozen.n_rows == 3


@pytest.mark.parametrize("scheme", ["", "local://"])
def test_folder_that_may_not_be_read_is_not_left_out_in_silence(
    tmp_path: Path, state: Storage, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    for name in ("a/1.jpg", "closed/2.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        (tmp_path / "images" / name).touch()
    refusal: OSError = PermissionError(13, "Permission denied", f"{tmp_path}/images/closed")
    scandir = os.scandir

    def guarded(path: str) -> object:
        if str(path).endswith("/closed"):
            raise refusal
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(InputError, match=r"cannot be listed whole: .*images/closed.*readable"):
        plan(f"{scheme}{tmp_path}/images", state)
    refusal = FileNotFoundError(2, "removed meanwhile")
    assert plan(f"{scheme}{tmp_path}/images", state).n_items == 1


def test_links_that_are_not_followed_are_named(
    tmp_path: Path, state: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    for name, target in (("a.jpg", tmp_path / "b.jpg"), ("more", tmp_path / "elsewhere")):
        (folder / name).symlink_to(target)
    (folder / "c.jpg").touch()
    assert plan(str(folder), state).n_items == 1
    assert f"{folder}: 2 links are left out" in caplog.text


def test_folder_whose_name_looks_like_a_pattern_is_a_folder(tmp_path: Path, state: Storage) -> None:
    (tmp_path / "what?").mkdir()
    (tmp_path / "what?" / "a.jpg").touch()
    assert plan(str(tmp_path / "what?"), state).n_items == 1


def test_signed_url_of_a_table_is_an_inventory(state: Storage) -> None:
    server = EtagServer()
    try:
        server.images["/in.csv?sig=a/b"] = b"uri,image_id\nhttps://a.example/1.jpg,\n2.jpg,x\n"
        frozen = plan(server.url("/in.csv?sig=a/b"), state)
    finally:
        server.close()
    assert [row["image_id"] for row in rows_of(state)] == ["https://a.example/1.jpg", "x"]
    assert frozen.items([(1, 2)])["container"].to_pylist() == [server.url("/2.jpg")]
    assert "a/b" not in frozen.origin.inventory


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_blank_image_id_is_the_uri(tmp_path: Path, state: Storage, form: str) -> None:
    rows = [{"uri": "https://a/1.jpg", "image_id": ""}, {"uri": "https://a/2.jpg", "image_id": "two"}]
    write_csv(tmp_path / "in.csv", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    plan(str(tmp_path / f"in.{form}"), state)
    assert [row["image_id"] for row in rows_of(state)] == ["https://a/1.jpg", "two"]


def test_bodies_of_a_shard_are_not_read_where_ranges_are(
    tmp_path: Path, state: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members of 300 kB with a caption each; small ones are read over, a megabyte at a time."""
    for name, length, n_members in (("large", 300_000, 40), ("small", 3_000, 1_000)):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for number in range(n_members):
                for ending, n_bytes in (("jpg", length), ("txt", 40)):
                    member = tarfile.TarInfo(f"{number:04d}.{ending}")
                    member.size = n_bytes
                    tar.addfile(member, io.BytesIO(bytes(n_bytes)))
    pieces: list[int] = []
    read_range = LocalStorage.read_range

    def counted(storage: LocalStorage, path: str, start: int, stop: int) -> bytes:
        pieces.append(stop - start)
        return read_range(storage, path, start, stop)

    monkeypatch.setattr(LocalStorage, "read_range", counted)
    assert plan(str(tmp_path / "large.tar"), state).n_items == 40
    assert sum(pieces) < 0.1 * (tmp_path / "large.tar").stat().st_size
    pieces.clear()
    assert plan(str(tmp_path / "small.tar"), open_storage(str(tmp_path / "other"))).n_items == 1_000
    assert len(pieces) < 10


def test_planning_of_shards_goes_on_where_it_was_interrupted(
    tmp_path: Path, state: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    for number in range(6):
        shard(tars / f"{number}.tar", [f"{number}.jpg"])
    whole = (tars / "5.tar").read_bytes()
    (tars / "5.tar").write_bytes(whole[:1_000])
    read: list[str] = []
    members_of = shards.members_of

    def counted(uri: str, all_files: bool) -> pa.Table:
        read.append(uri[-5:])
        return members_of(uri, all_files)

    monkeypatch.setattr(shards, "members_of", counted)
    with pytest.raises(InputError, match=r"5\.tar"):
        plan(str(tars), state)
    (tars / "5.tar").write_bytes(whole)
    shard(tars / "3.tar", ["changed.jpg", "3.jpg"])
    read.clear()
    assert plan(str(tars), state).n_items == 7
    assert sorted(read) == ["3.tar", "5.tar"]
    assert not list(state.list("plan/tars"))


def test_shard_on_a_server_without_ranges_is_refused(tmp_path: Path, state: Storage) -> None:
    """Its images could not be fetched by their byte ranges either."""
    server = EtagServer()
    try:
        server.images["/a.tar"] = shard(tmp_path / "a.tar", [f"{n}.jpg" for n in range(40)]).read_bytes()
        with pytest.raises(StorageError, match="not served in byte ranges"):
            plan(server.url("/a.tar"), state)
    finally:
        server.close()


def test_table_is_not_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading ahead, as pyarrow does by default, would take memory with the size of the inventory."""
    path, n_bytes = tmp_path / "in.parquet", [0]
    uris = pa.table({"uri": [f"https://a.invalid/{n:0>200}.jpg" for n in range(100_000)]})
    pq.write_table(uris, path, row_group_size=5_000, compression="none", use_dictionary=False)

    class Counting(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            found = super().read(-1 if size is None else size) or b""
            n_bytes[0] += len(found)
            return found

    monkeypatch.setattr(tables, "open_input", lambda uri: pa.PythonFile(Counting(uri)))
    monkeypatch.setattr(tables, "BATCH_ROWS", 1_000)
    batches = tables.read_batches([str(path)], uris.schema, ["uri"])
    assert next(batches).num_rows == 1_000
    assert n_bytes[0] <= 0.3 * path.stat().st_size
    assert sum(batch.num_rows for batch in batches) == 99_000


def test_keys_that_are_not_utf8_keep_their_rows(tmp_path: Path, state: Storage) -> None:
    """Spark writes any bytes as text, and JSON lines of another encoding pass as well."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"uri": "https://a/caf\xe9.jpg", "image_id": "\xff1"}\n{"uri": "https://a/b.jpg"}\n')
    plan(str(path), state)
    found = rows_of(state)
    assert [row["uri"] for row in found] == ["https://a/caf\ufffd.jpg", "https://a/b.jpg"]
    assert [row["image_id"] for row in found] == ["\ufffd1", "https://a/b.jpg"]


def small_inventory(folder: Path, name: str) -> bytes:
    """The bytes of an inventory of each form, of forty images."""
    path = folder / name
    rows = [{"uri": f"https://a.invalid/{n}.jpg", "page": n} for n in range(40)]
    match name:
        case "shard.tar":
            shard(path, [f"{n}.jpg" for n in range(40)])
        case "images.parquet":
            images = [{"bytes": bytes([n]) * 500, "path": f"{n}.jpg"} for n in range(40)]
            pq.write_table(pa.table({"image": images}), path, row_group_size=15)
        case "uris.parquet":
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=15)
        case "uris.csv":
            write_csv(path, rows)
        case _:
            path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path.read_bytes()


@pytest.mark.parametrize("name", ["shard.tar", "images.parquet", "uris.parquet", "uris.csv", "uris.jsonl"])
def test_damaged_inventory_is_planned_or_refused_and_its_images_have_a_status(
    tmp_path: Path, name: str
) -> None:
    """Flipped bits, cuts, extreme headers, repeated and missing pieces."""
    whole = small_inventory(tmp_path, name)
    planned = 0
    with Fetcher(FetchLimits(max_attempts=1)) as fetcher:
        for number, damaged in enumerate(mutations([whole], N_DAMAGED)):
            path = tmp_path / str(number) / name
            path.parent.mkdir()
            path.write_bytes(damaged)
            try:
                frozen = plan(str(path), open_storage(str(tmp_path / f"state-{number}")))
            except InputError:
                continue
            planned += 1
            sources = sources_of(frozen.items([(0, frozen.n_items)]))
            found = {one.status for _, one in fetcher.fetch_many(sources)} if "uris" not in name else set()
            assert Status.INTERNAL_ERROR not in found
    assert 0 < planned < N_DAMAGED


def test_pattern_takes_what_it_matches(tmp_path: Path, state: Storage) -> None:
    for name in ("a-0.parquet", "a-1.parquet", "b-0.parquet"):
        pq.write_table(pa.table({"uri": [name]}), tmp_path / name)
    plan(str(tmp_path / "a-*.parquet"), state)
    assert [row["uri"] for row in rows_of(state)] == ["a-0.parquet", "a-1.parquet"]


def test_every_row_of_a_heavily_repeated_table_is_in_the_plan_once(
    tmp_path: Path, state: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spills, batches, row groups and files are all cut many times; nothing may fall between them."""
    monkeypatch.setattr(tables, "BATCH_ROWS", 700)
    monkeypatch.setattr(dedupe, "ROWS_AT_ONCE", 900)
    monkeypatch.setattr(dedupe, "MAX_ROWS_PER_ITEM", 50)
    monkeypatch.setattr(frozen_plan, "ITEMS_PER_GROUP", 64)
    monkeypatch.setattr(frozen_plan, "ROWS_PER_GROUP", 300)
    monkeypatch.setattr(frozen_plan, "ITEMS_PER_FILE", 500)
    random = np.random.default_rng(7)
    images = np.where(random.random(10_000) < 0.2, 0, random.integers(0, 3_000, 10_000))
    uris = [f"https://e.example/{n}" for n in images]
    pq.write_table(pa.table({"uri": uris, "n": np.arange(10_000)}), tmp_path / "inventory.parquet")
    frozen = plan(str(tmp_path / "inventory.parquet"), state)
    items = frozen.read(0, frozen.n_items, ["uri", "table_rows"]).to_pylist()
    assert sorted((row["n"], item["uri"]) for item in items for row in item["table_rows"]) == list(
        enumerate(uris)
    )
    assert max(len(item["table_rows"]) for item in items) == 50
    repeated = [item["uri"] for item in items if len(item["table_rows"]) < 50]
    assert len(repeated) == len(set(repeated))
    firsts = [item["table_rows"][0]["n"] for item in items]
    assert firsts == sorted(firsts)
    assert len(frozen.files) > 3


def test_colliding_hashes_never_join_rows_of_two_images(
    tmp_path: Path, state: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    every_row = dedupe.REPEATED.replace("hash IN", "row >= 0 OR hash IN")
    monkeypatch.setattr(dedupe, "REPEATED", every_row)
    rows = [{"uri": f"u{n % 4}" if n % 3 else f"alone{n}", "n": str(n)} for n in range(12)]
    plan(str(write_csv(tmp_path / "inventory.csv", rows)), state)
    found = rows_of(state)
    assert sorted((row["uri"], int(row["n"])) for row in found) == sorted(
        (row["uri"], int(row["n"])) for row in rows
    )


def test_plan_does_not_depend_on_the_threads_that_group_it(
    tmp_path: Path, state: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DuckDB gives the same rows in other batches when it has more threads."""
    monkeypatch.setattr(dedupe, "ROWS_AT_ONCE", 20_000)
    images = np.random.default_rng(7).integers(0, 100_000, 300_000)
    uris = [f"https://e.example/{n}" for n in images]
    pq.write_table(pa.table({"uri": uris, "n": np.arange(len(uris))}), tmp_path / "inventory.parquet")
    hashes = set()
    for threads in (1, 2, 8):
        monkeypatch.setitem(dedupe.SETTINGS, "threads", threads)
        hashes.add(plan(str(tmp_path / "inventory.parquet"), open_storage(f"{tmp_path}/{threads}")).hash)
    assert len(hashes) == 1


def test_any_range_of_the_plan_reads_the_same_wherever_it_starts(
    tmp_path: Path, state: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_plan, "ITEMS_PER_GROUP", 10)
    monkeypatch.setattr(frozen_plan, "ITEMS_PER_FILE", 35)
    write_csv(tmp_path / "inventory.csv", [{"uri": f"u{n}"} for n in range(100)])
    frozen = pickle.loads(pickle.dumps(plan(str(tmp_path / "inventory.csv"), state)))
    whole = frozen.read(0, 100, ["item_id", "uri"])
    for start in range(0, 100, 7):
        assert frozen.read(start, min(100, start + 23), ["item_id", "uri"]) == whole.slice(start, 23)
    scattered = frozen.items([(90, 92), (3, 4), (34, 36)], ["item_id"])
    assert scattered["item_id"].to_pylist() == [90, 91, 3, 34, 35]
    with pytest.raises(IndexError, match="100"):
        frozen.read(99, 101)


def test_two_drivers_that_plan_at_once_agree_or_are_told(tmp_path: Path, state: Storage) -> None:
    """The second writes its files before the first has created plan.json, and finds it there at the end."""
    first = write_csv(tmp_path / "a.csv", [{"uri": "a"}])
    other = write_csv(tmp_path / "b.csv", [{"uri": "b"}])
    frozen = plan(str(first), state)
    hidden = HiddenOnce(state)
    assert plan(str(first), hidden) == frozen
    with pytest.raises(InputError, match="something else"):
        plan(str(other), HiddenOnce(state))
    assert [row["uri"] for row in rows_of(state)] == ["a"]


class HiddenOnce:
    """A storage whose first look for plan.json comes too early."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._looked = False

    def exists(self, path: str) -> bool:
        looked, self._looked = self._looked, True
        return looked and self._storage.exists(path)

    def __getattr__(self, name: str) -> object:
        return getattr(self._storage, name)
