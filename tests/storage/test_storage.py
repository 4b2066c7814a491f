"""The same behaviour on every back end: local, fsspec's memory, and S3 (in test_s3.py)."""

import io
import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipelines.messages import InputError, redact, redacted
from pipelines.storage import uris
from pipelines.storage.objects import object_store
from pipelines.storage.storage import Storage, open_storage
from pipelines.storage.uris import AlreadyExists


@pytest.fixture(params=["local", "memory", "fsspec-local"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage of each kind that needs no server."""
    uris = {
        "local": str(tmp_path / "folder"),
        "memory": f"memory://{tmp_path.name}/folder",
        "fsspec-local": f"local://{tmp_path}/folder",
    }
    return open_storage(uris[request.param])


def test_put_replaces_and_read_returns_the_last_bytes(folder: Storage) -> None:
    folder.put("a/b.txt", b"one")
    folder.put("a/b.txt", b"two")
    assert folder.read("a/b.txt") == b"two"
    assert folder.size("a/b.txt") == 3


def test_create_refuses_other_bytes_and_accepts_its_own_again(folder: Storage) -> None:
    folder.create("ledger/000000.json", b"mine")
    folder.create("ledger/000000.json", b"mine")
    with pytest.raises(AlreadyExists):
        folder.create("ledger/000000.json", b"theirs")
    assert folder.read("ledger/000000.json") == b"mine"


def test_a_missing_file_is_file_not_found_whatever_asks(folder: Storage) -> None:
    for ask in (folder.read, folder.size, folder.open_input):
        with pytest.raises(FileNotFoundError):
            ask("nope")
    assert not folder.exists("nope")
    assert folder.list("nope") == []
    folder.delete("nope")


def test_list_is_sorted_relative_and_recursive(folder: Storage) -> None:
    for path in ("b/2", "b/1", "a", "b/c/3"):
        folder.put(path, b"xy")
    assert [(entry.path, entry.size) for entry in folder.list()] == [
        ("a", 2), ("b/1", 2), ("b/2", 2), ("b/c/3", 2),
    ]  # fmt: skip
    assert [entry.path for entry in folder.list("b")] == ["b/1", "b/2", "b/c/3"]


def test_put_file_and_delete(folder: Storage, tmp_path: Path) -> None:
    (tmp_path / "local").write_bytes(b"payload")
    folder.put_file("x/y", tmp_path / "local")
    folder.put("z", b"other")
    assert folder.read("x/y") == b"payload"
    folder.delete("x/y")
    assert [entry.path for entry in folder.list()] == ["z"]


def test_pyarrow_reads_parquet_through_any_storage_after_pickling(folder: Storage) -> None:
    table = pa.table({"a": range(10_000)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    folder.put("t/x.parquet", buffer.getvalue())
    again: Storage = pickle.loads(pickle.dumps(folder))
    assert pq.read_table(again.open_input("t/x.parquet")).equals(table)
    filesystem, path = again.filesystem_and_path()
    assert ds.dataset(f"{path}/t", filesystem=filesystem).count_rows() == 10_000


def test_local_create_has_exactly_one_winner_among_racing_threads(tmp_path: Path) -> None:
    folder = open_storage(str(tmp_path))

    def write(path: str, writer: int, start: threading.Barrier) -> int | None:
        start.wait()
        try:
            folder.create(path, str(writer).encode())
        except AlreadyExists:
            return None
        return writer

    with ThreadPoolExecutor(8) as pool:
        for race in range(20):
            start = threading.Barrier(8)
            futures = [pool.submit(write, f"{race}", writer, start) for writer in range(8)]
            won = [future.result() for future in futures if future.result() is not None]
            assert [int(folder.read(f"{race}"))] == won


@pytest.mark.parametrize("scheme", ["gs", "gcs"])
def test_every_character_of_a_folder_in_a_bucket_counts(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key = {"private_key": "", "private_key_id": "", "client_email": "", "disable_oauth": True}
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(key))
    assert object_store(f"{scheme}://bucket/a%20b/run#1?x").prefix == "a%20b/run#1?x"


@pytest.mark.parametrize("uri", ["nope://host/folder", "s3://", "gs:///folder"])
def test_a_uri_that_no_storage_takes_is_wrong_input(uri: str) -> None:
    with pytest.raises(InputError, match=uri):
        open_storage(uri).read("file")


def test_a_temporary_name_left_by_a_crash_is_never_listed(tmp_path: Path) -> None:
    folder = open_storage(str(tmp_path))
    (tmp_path / f".part.parquet.{'0' * 32}.tmp").write_bytes(b"half")
    assert folder.list() == []


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    folder = open_storage(str(tmp_path))
    folder.put("a", b"old")
    with pytest.raises(TypeError):
        folder.put("a", "not bytes")  # type: ignore[arg-type]
    assert folder.read("a") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_put_file_crosses_filesystems(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second filesystem")
    spool = shared / f"iab-vision-{tmp_path.name}"
    spool.write_bytes(b"far")
    try:
        open_storage(str(tmp_path)).put_file("near", spool)
    finally:
        spool.unlink(missing_ok=True)
    assert (tmp_path / "near").read_bytes() == b"far"


def test_only_real_conditional_puts_call_themselves_fenced(tmp_path: Path) -> None:
    assert open_storage(str(tmp_path)).fenced
    assert open_storage("s3://bucket/prefix").fenced
    assert not open_storage("memory://x").fenced


def test_join_and_split_keep_schemes_and_relative_paths() -> None:
    assert uris.join("s3://b/p/", "x", "/y") == "s3://b/p/x/y"
    assert uris.split("s3://b/p/x") == ("s3://b/p", "x")
    assert uris.split("/x") == ("/", "x")
    assert uris.split("x") == (".", "x")


def test_redact_takes_out_passwords_and_query_values_and_leaves_the_rest() -> None:
    """Any value may be a signature."""
    text = "GET https://me:pw@h/a.jpg?w=10&Sig=ab: 403, then https://u:p@ss@h/b?verify=t&h=2 or s3://h:80/a@b"
    assert redact(text) == (
        "GET https://h/a.jpg?w=REDACTED&Sig=REDACTED 403, then https://h/b?verify=REDACTED&h=REDACTED "
        "or s3://h:80/a@b"
    )
    assert redact("ftp://me:pa/ss@h/x, why? as it is") == "ftp://h/x, why? as it is"
    assert redact("http://me:it's@h/x?token=ab'cd") == "http://h/x?token=REDACTED"


def test_redact_of_plain_data_keeps_it_what_it_was() -> None:
    data = {"a": "s3://b/x?v=1", "why": 'GET "https://h/a?sig=abc" failed', "n": [1, None, ("c@d",)]}
    assert json.loads(json.dumps(redacted(data))) == {
        "a": "s3://b/x?v=REDACTED", "why": 'GET "https://h/a?sig=REDACTED failed', "n": [1, None, ["c@d"]],
    }  # fmt: skip
    assert redacted({"k://u:p@h": 1}) == {"k://h": 1}
