"""Storage, ledger and publishing against a real object store.

Talks to the S3 that AWS_ENDPOINT_URL and the other usual variables name, and otherwise to moto's server in
a thread, and removes the buckets that it made. IAB_VISION_TEST_BUCKET names an empty bucket of
any object store instead, such as az://container; what is S3's own is then left out.
"""

import os
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipelines.ledger.entries import LedgerDamaged
from pipelines.ledger.ledger import LedgerLost
from pipelines.ledger.parts import Committer
from pipelines.ledger.publish import publish
from pipelines.ledger.verify import verify
from pipelines.storage.storage import Storage, open_storage, sha256_of
from pipelines.storage.uris import AlreadyExists, StorageError, join
from tests.builders.flaky_proxy import FlakyProxy
from tests.builders.hooked_storage import HookedStorage, Unfenced
from tests.builders.predictions import SmallRun, paused_in_the_put, small_run
from tests.conftest import MOTO_SECRET

pytestmark = pytest.mark.s3

only_s3 = pytest.mark.skipif("IAB_VISION_TEST_BUCKET" in os.environ, reason="is about S3's own settings")

OUTAGE_S = float(os.environ.get("IAB_VISION_TEST_OUTAGE_S", "3"))


@pytest.fixture
def folder(bucket: str) -> Storage:
    return open_storage(join(bucket, uuid.uuid4().hex))


def small_run_on(bucket: str, n_items: int = 20) -> SmallRun:
    return small_run(join(bucket, uuid.uuid4().hex), n_items)


def test_put_read_list_delete(folder: Storage) -> None:
    folder.put("a/b=1/per%20cent ü.txt", b"one")
    folder.put("a/b=1/per%20cent ü.txt", b"two")
    folder.put("z", b"end")
    entries = folder.list()
    assert [(entry.path, entry.size) for entry in entries] == [("a/b=1/per%20cent ü.txt", 3), ("z", 3)]
    assert all(entry.etag and entry.last_modified for entry in entries)
    assert folder.read("a/b=1/per%20cent ü.txt") == b"two"
    folder.delete("z")
    folder.delete("z")
    assert not folder.exists("z")
    assert [entry.path for entry in folder.list("a")] == ["a/b=1/per%20cent ü.txt"]


def test_folders_that_differ_behind_a_number_sign_are_two(bucket: str) -> None:
    first, second = (open_storage(join(bucket, f"{uuid.uuid4().hex}/run{mark}")) for mark in ("#1", "?2"))
    first.put("x", b"one")
    assert second.list() == []
    assert first.open_input("x").read() == b"one"
    filesystem, path = first.filesystem_and_path()
    assert filesystem.get_file_info(f"{path}/x").size == 3


def test_a_listing_goes_on_after_the_first_thousand(folder: Storage) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: folder.put(f"{number:05d}", b""), range(1_100)))
    assert [entry.path for entry in folder.list()] == [f"{number:05d}" for number in range(1_100)]


def test_a_file_beyond_the_multipart_threshold_arrives_whole(folder: Storage, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(os.urandom(1 << 20) * 12)
    expected = sha256_of(open_storage(str(tmp_path)), "big")
    folder.put_file("big", tmp_path / "big")
    assert folder.size("big") == 12 << 20
    assert sha256_of(folder, "big") == expected


def test_of_sixteen_racing_writers_exactly_one_creates_the_object(folder: Storage) -> None:
    def write(path: str, writer: int) -> int | None:
        try:
            folder.create(path, f"{writer}".encode())
        except AlreadyExists:
            return None
        return writer

    with ThreadPoolExecutor(16) as pool:
        for race in range(10):
            won = list(pool.map(lambda writer, race=race: write(f"{race}", writer), range(16)))
            assert [each for each in won if each is not None] == [int(folder.read(f"{race}"))]


def test_a_file_is_replaced_only_while_it_is_what_was_seen(folder: Storage, tmp_path: Path) -> None:
    for name, size in (("old", 1), ("new", 12 << 20), ("late", 12 << 20)):
        (tmp_path / name).write_bytes(os.urandom(size))
    assert folder.version("x") is None
    folder.put_file_over("x", tmp_path / "old", None)
    seen = folder.version("x")
    folder.put_file_over("x", tmp_path / "new", seen)
    folder.put_file_over("x", tmp_path / "new", seen)  # as a client does whose answer got lost
    for stale in (seen, None):
        with pytest.raises(AlreadyExists, match="written by another process"):
            folder.put_file_over("x", tmp_path / "late", stale)
    assert folder.read("x") == (tmp_path / "new").read_bytes()


def test_a_publisher_that_was_paused_does_not_write_over_a_rerun(bucket: str) -> None:
    run = small_run_on(bucket, 2)
    with pytest.raises(LedgerLost, match="another driver"):
        paused_in_the_put(run)
    assert [check.name for check in verify(run.uri) if not check.ok] == ["report"]
    table = pq.read_table(run.table.open_input("part-00000.parquet"))
    assert set(table["status"].to_pylist()) == {"ok"}


def test_a_repeated_create_of_ones_own_bytes_is_success(folder: Storage) -> None:
    folder.create("entry", b"nonce 1")
    folder.create("entry", b"nonce 1")
    with pytest.raises(AlreadyExists):
        folder.create("entry", b"nonce 2")


def test_a_missing_object_is_file_not_found_and_a_missing_bucket_is_not(folder: Storage, bucket: str) -> None:
    for ask in (folder.read, folder.size, folder.open_input):
        with pytest.raises(FileNotFoundError):
            ask("nope")
    assert folder.list("nope") == []
    nowhere = open_storage(f"{bucket}-nowhere/x")
    for attempt in (nowhere.list, lambda: nowhere.create("x", b""), lambda: nowhere.read("x")):
        with pytest.raises(StorageError, match="check the bucket's name"):
            attempt()


@only_s3
def test_a_wrong_key_is_one_sentence_without_the_key(
    folder: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.environ["AWS_SECRET_ACCESS_KEY"] == MOTO_SECRET:
        pytest.skip("moto does not check signatures")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(StorageError, match="403") as refusal:
        open_storage(folder.uri).put("x", b"")
    assert "\n" not in str(refusal.value)
    assert "wrong-secret" not in str(refusal.value)
    assert len(str(refusal.value)) < 300


@only_s3
def test_a_profile_of_the_shared_credentials_file_is_found(
    folder: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [
        f"aws_{name} = {os.environ[f'AWS_{name.upper()}']}" for name in ("access_key_id", "secret_access_key")
    ]
    (tmp_path / "credentials").write_text("\n".join(["[nightly]", *keys]))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "nightly")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    again = open_storage(folder.uri)
    again.put("x", b"signed")
    assert again.open_input("x").read() == b"signed"


@only_s3
def test_an_endpoint_where_nothing_listens_is_named_after_the_patience_runs_out(
    folder: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:1"):
        open_storage(folder.uri, patience_s=1).read("x")
    assert time.monotonic() - started < 10


def test_the_whole_story_in_a_bucket(bucket: str) -> None:
    run = small_run_on(bucket)
    ledger = run.ledger()
    ledger.announce()
    committer = Committer(ledger, run.state, every_s=0)
    for item_ids in (range(8), range(5, 15), range(14, 20)):
        committer.add(run.write(item_ids))
    committer.flush()
    run.publish(ledger)
    failed = [check for check in verify(run.uri) if not check.ok]
    assert [check.name for check in failed] == ["report"]
    assert run.state.list("parts") == []
    filesystem, path = run.table.filesystem_and_path()
    names = [f"{path}/{entry.path}" for entry in run.table.list() if entry.path.endswith(".parquet")]
    assert ds.dataset(names, filesystem=filesystem).count_rows() == run.plan.n_rows
    first = pq.read_table(run.table.open_input("part-00000.parquet"))
    assert first["image_id"][0].as_py() == "image-0-0"


def race(run: SmallRun, wrap: Callable[[Storage], Storage]) -> list[str]:
    """Four drivers at once; what became of each."""
    start = threading.Barrier(4)

    def drive(_: int) -> str:
        ledger = run.ledger(wrap(run.state))
        part = run.write(range(run.plan.n_items))
        start.wait()
        try:
            ledger.announce()
            ledger.record([part])
            publish(ledger, run.plan, run.state, wrap(run.table), rows_per_file=100)
        except LedgerLost as error:
            assert "another driver" in str(error)
            return "lost"
        except (LedgerDamaged, FileNotFoundError) as error:
            return type(error).__name__
        return "finished"

    with ThreadPoolExecutor(4) as pool:
        return sorted(pool.map(drive, range(4)))


def test_of_drivers_started_at_once_one_finishes_and_the_others_say_why(bucket: str) -> None:
    for _ in range(5):
        run = small_run_on(bucket, 4)
        assert race(run, lambda state: state) == ["finished", "lost", "lost", "lost"]
        assert [check.name for check in verify(run.uri) if not check.ok] == ["report"]


def through(operation: str, args: tuple[Any, ...], proceed: Callable[[], Any]) -> Any:
    return proceed()


def test_it_is_the_conditional_put_that_fences(bucket: str) -> None:
    """The same race over plain puts: more than one driver takes itself for the only one."""
    outcomes = [race(small_run_on(bucket, 4), lambda storage: Unfenced(storage, through)) for _ in range(5)]  # type: ignore[arg-type,return-value]
    assert any(outcome != ["finished", "lost", "lost", "lost"] for outcome in outcomes)


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("survives", [2, 4, 6, 8, 9])
def test_a_driver_killed_in_the_middle_is_continued(bucket: str, survives: int) -> None:
    run = small_run_on(bucket, 8)
    left = [survives]

    def dying(operation: str, args: tuple[Any, ...], proceed: Callable[[], Any]) -> Any:
        if operation in ("put", "put_file_over", "create", "delete"):
            if not left[0]:
                raise Killed
            left[0] -= 1
        return proceed()

    def drive(state: Any, table: Any) -> None:
        ledger = run.ledger(state)
        ledger.announce()
        committer = Committer(ledger, state, every_s=0)
        for start, stop in ledger.done.missing():
            for item_id in range(start, stop, 3):
                committer.add(run.write(range(item_id, min(stop, item_id + 3)), state=state))
        committer.flush()
        publish(ledger, run.plan, state, table, rows_per_file=4)

    with pytest.raises(Killed):
        drive(HookedStorage(run.state, dying), HookedStorage(run.table, dying))
    drive(run.state, run.table)
    assert [check.name for check in verify(run.uri) if not check.ok] == ["report"]


@only_s3
def test_an_outage_in_mid_run_is_ridden_out(
    bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FlakyProxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        run = small_run_on(bucket, 6)
        state = run.state
        ledger = run.ledger(state)
        ledger.announce()
        parts = [run.write(range(0, 3), state=state), run.write(range(3, 6), state=state)]
        ledger.record(parts[:1])
        proxy.take_down()
        back = threading.Timer(OUTAGE_S, proxy.bring_back)
        started = time.monotonic()
        back.start()
        ledger.record(parts[1:])
        assert time.monotonic() - started >= OUTAGE_S
        run.publish(ledger)
        assert [check.name for check in verify(run.uri) if not check.ok] == ["report"]
