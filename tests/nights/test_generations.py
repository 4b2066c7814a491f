"""Dates are published whole, once, and replaced without a mixture; what is old is removed as it is listed."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow.dataset as pads
import pytest

from jobs import prune_table, run_nightly
from jobs.cli import main, parse
from pipelines.ledger.ledger import Ledger
from pipelines.nights import night as nights_of_a_date
from pipelines.nights.folders import DateFolders, latest_date
from pipelines.storage.local import LocalStorage
from tests.builders.etag_server import EtagServer
from tests.builders.fault_server import FaultServer
from tests.builders.made_up_night import publish_made_up_night
from tests.nights.conftest import Nights, picture

FIRST, SECOND, THIRD = "2026-11-19", "2026-11-20", "2026-11-21"


@pytest.fixture
def three(nights: Nights, server: EtagServer) -> Nights:
    """Images to publish."""
    server.images = {f"/{number}.png": picture(number) for number in range(5)}
    nights.list_images([server.url(path) for path in server.images], etag=list("abcde"))
    return nights


def written_at(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_published_date_repeats_its_verdict_and_reads_no_inventory(three: Nights, capsys) -> None:
    assert three.make(FIRST) == 0
    said, before = capsys.readouterr().out, written_at(three.table)
    (three.folder / "inventory.parquet").unlink()
    assert three.make(FIRST) == 0
    assert capsys.readouterr().out == said
    assert written_at(three.table) == before
    verdict = three.table / "state" / f"run_date={FIRST}" / "verdict.json"
    verdict.write_text(json.dumps(json.loads(verdict.read_text()) | {"exit_code": 3}))
    assert three.make(FIRST) == 3


def test_three_readers_see_every_night_with_its_date_from_the_path(three: Nights) -> None:
    for day in (FIRST, SECOND, THIRD):
        assert three.make(day) == 0
    pattern = f"{three.table}/images/run_date=*/*.parquet"
    expected = {FIRST: 5, SECOND: 5, THIRD: 5}
    by_duckdb = duckdb.sql(
        f"SELECT run_date, count(*) FROM read_parquet('{pattern}', hive_partitioning = true) GROUP BY 1"
    )
    assert {str(day): n for day, n in by_duckdb.fetchall()} == expected
    by_polars = pl.scan_parquet(pattern, hive_partitioning=True).select("run_date").collect()
    assert Counter(map(str, by_polars["run_date"])) == expected
    by_arrow = pads.dataset(three.table / "images", format="parquet", partitioning="hive").to_table()
    assert Counter(by_arrow["run_date"].to_pylist()) == expected


def test_replace_publishes_another_generation_and_removes_the_first(
    three: Nights, server: EtagServer
) -> None:
    assert three.make(FIRST) == 0
    server.images["/9.png"] = picture(9)
    three.list_images([server.url("/0.png"), server.url("/9.png")], etag=["a", "z"])
    assert three.make(FIRST) == 0  # as published
    assert len(three.rows(FIRST)) == 5
    assert three.make(FIRST, "--replace") == 0
    folder = three.table / "images" / f"run_date={FIRST}"
    manifest = json.loads((folder / "_SUCCESS").read_text())
    assert manifest["generation"] == 2
    names = {file["name"] for file in manifest["files"]}
    assert {path.name for path in folder.iterdir()} == {*names, "_SUCCESS"}
    assert all(name.endswith("-g2.parquet") for name in names)
    for file in manifest["files"]:
        assert hashlib.sha256((folder / file["name"]).read_bytes()).hexdigest() == file["sha256"]
    assert len(three.rows(FIRST)) == 2
    assert set(three.carried(FIRST).values()) == {None}
    assert three.report(FIRST)["generation"] == 2
    assert main(["verify", str(three.table)]) == 0
    assert three.make(SECOND) == 0
    assert set(three.carried(SECOND).values()) == {FIRST}


def test_retry_failed_writes_a_generation(three: Nights, server: EtagServer) -> None:
    late = picture(50)
    uris = [server.url(path) for path in server.images]
    refused = "http://127.0.0.2:9/x.png"
    three.list_images([*uris, refused])
    assert three.make(FIRST, "--retry-passes", "0") == 0
    server.images["/late.png"] = late
    assert three.make(FIRST, "--retry-failed", "--retry-passes", "0") == 0
    manifest = json.loads((three.table / "images" / f"run_date={FIRST}" / "_SUCCESS").read_text())
    assert manifest["generation"] == 2
    assert len(three.rows(FIRST)) == 6
    assert main(["verify", str(three.table)]) == 0
    server.forget()
    assert three.make(SECOND, "--retry-passes", "0") == 0
    assert server.answers == {304: 5}


def test_labels_carried_from_a_night_that_lost_them_are_found(nights: Nights, server: EtagServer) -> None:
    """A replaced night has fewer images, or one of them timed out; a later night has their labels."""
    server.images = {f"/{number}.png": picture(number) for number in range(4)}
    uris = [server.url(path) for path in server.images]
    nights.list_images(uris)
    assert nights.make(FIRST) == 0
    assert nights.make(SECOND) == 0
    nights.list_images(uris[:2])
    assert nights.make(FIRST, "--replace") == 0
    nights.list_images(uris)
    server.forget()
    assert nights.make(THIRD) == 0
    assert server.answers == {304: 4}
    assert nights.results(THIRD) == nights.results(SECOND)
    assert set(nights.carried(THIRD).values()) == {FIRST}


def test_images_whose_labels_are_gone_are_classified_again(
    nights: Nights, server: EtagServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An old night is removed while this one is interrupted."""
    server.images = {"/1.png": picture(1), "/2.png": picture(2), "/copy.png": picture(1)}
    one, two, copy = map(server.url, server.images)
    nights.list_images([one, two])
    assert nights.make(FIRST) == 0
    nights.list_images([two])
    assert nights.make(SECOND) == 0
    nights.list_images([two, copy])
    with monkeypatch.context() as patched:
        patched.setattr(run_nightly.nights, "publish_night", crash)
        with pytest.raises(Crash):
            make_here(nights, THIRD)
    for folder in ("images", "state"):
        shutil.rmtree(nights.table / folder / f"run_date={FIRST}")
    server.forget()
    assert nights.make(THIRD) == 0
    assert server.asked == ["/copy.png"]
    assert "the results of 1 images are gone" in caplog.text
    assert nights.carried(THIRD) == {two: FIRST, copy: None}
    assert {row["status"] for row in nights.rows(THIRD)} == {"ok"}
    assert main(["verify", str(nights.table)]) == 0


def test_retry_failed_mends_a_refused_night(three: Nights, server: EtagServer) -> None:
    failing = FaultServer()
    try:
        uris = [server.url(path) for path in server.images]
        three.list_images([*uris, f"{failing.url}/image-after-503-twice"])
        settings = ["--max-error-rate", "0.1", "--retry-passes", "0"]
        assert three.make(FIRST, *settings) == 3
        server.forget()
        assert three.make(FIRST, *settings, "--retry-failed") == 3
        assert three.make(FIRST, *settings, "--retry-failed") == 0
        assert failing.requests["/image-after-503-twice"] == 3
        assert not server.asked
    finally:
        failing.close()
    assert {row["status"] for row in three.rows(FIRST)} == {"ok"}
    assert three.report(FIRST)["generation"] == 1


def test_replace_begins_again_where_everything_was_classified_and_nothing_published(
    three: Nights, server: EtagServer
) -> None:
    images, server.images = server.images, {}
    assert three.make(FIRST, "--max-error-rate", "0.1") == 3
    server.images = images
    assert three.make(FIRST, "--max-error-rate", "0.1") == 3
    assert three.make(FIRST, "--max-error-rate", "0.1", "--replace") == 0
    assert {row["status"] for row in three.rows(FIRST)} == {"ok"}
    assert three.report(FIRST)["generation"] == 2


def test_a_late_date_is_made_from_the_nights_before_it(three: Nights) -> None:
    assert three.make(FIRST) == 0
    assert three.make(THIRD) == 0
    assert three.make(SECOND) == 0
    assert set(three.carried(SECOND).values()) == {FIRST}


@pytest.mark.parametrize(
    "day", ["2026-13-01", "yesterday", "20261121T", "20261121", "1763683200", "2026-11-21T00:00:00"]
)
def test_a_date_that_is_none_is_wrong_input(three: Nights, day: str, capsys) -> None:
    assert three.make(day) == 2
    assert "--date" in capsys.readouterr().err


def test_a_mistyped_year_is_wrong_input_that_names_the_latest_date(three: Nights, capsys) -> None:
    wrong = latest_date() + timedelta(days=1)
    assert three.make(str(wrong)) == 2
    said = capsys.readouterr().err
    assert f"--date {wrong}" in said and f"{latest_date()}" in said
    assert not three.table.exists()


def test_prune_does_not_count_from_a_date_in_the_future(three: Nights, caplog) -> None:
    wrong = latest_date() + timedelta(days=365)
    inventory = three.folder / "inventory.parquet"
    for day in (date.fromisoformat(FIRST), date.fromisoformat(SECOND), wrong):
        publish_made_up_night(inventory, three.bundle, three.table, day)
    assert main(["prune", str(three.table), "--keep-days", "28"]) == 0
    assert f"{wrong} is in the future" in caplog.text
    assert [len(three.rows(day)) for day in (FIRST, SECOND, str(wrong))] == [5, 5, 5]


class Crash(BaseException):
    """The process is gone."""


def crash_at(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], int]:
    """Die at the n-th write to storage; returns how many there were."""
    writes = 0

    def counting(name: str) -> None:
        proceed = getattr(LocalStorage, name)

        def call(self: LocalStorage, *args: Any) -> Any:
            nonlocal writes
            writes += 1
            if writes == number:
                raise Crash
            return proceed(self, *args)

        monkeypatch.setattr(LocalStorage, name, call)

    for name in ("put", "put_file", "create", "delete"):
        counting(name)
    return lambda: writes


def make_here(nights: Nights, day: str, *settings: str) -> int:
    """The command in this process, without the border that turns a crash into an exit code."""
    return run_nightly.run(parse("nightly", nights.command(day, *settings)[1:]))


def read_generation(folder: Path) -> tuple[int, int] | None:
    """What a careful reader sees: generation and rows of the files that `_SUCCESS` lists; None: not there."""
    if not (folder / "_SUCCESS").exists():
        return None
    manifest = json.loads((folder / "_SUCCESS").read_text())
    files = [folder / file["name"] for file in manifest["files"]]
    rows = sum(pl.read_parquet(path).height for path in files)
    return manifest["generation"], rows


@pytest.mark.slow
def test_a_kill_at_any_write_leaves_a_generation_whole_or_absent(
    three: Nights, server: EtagServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    three.list_images([server.url("/0.png"), server.url("/1.png")], etag=["a", "b"])
    assert make_here(three, FIRST) == 0
    three.list_images([server.url(path) for path in server.images], etag=["a", *"vwxy"])
    folder = three.table / "images" / f"run_date={FIRST}"
    original = three.folder / "original"
    shutil.copytree(three.table, original)
    number = 0
    while True:
        number += 1
        shutil.rmtree(three.table)
        shutil.copytree(original, three.table)
        with monkeypatch.context() as patched:
            crash_at(patched, number)
            try:
                code = make_here(three, FIRST, "--replace")
            except Crash:
                code = None
        assert read_generation(folder) in (None, (1, 2), (2, 5)), number
        if code == 0:
            break
        begun = DateFolders(str(three.table), date.fromisoformat(FIRST)).runs()
        again = [] if begun[-1] == 2 else ["--replace"]
        assert make_here(three, FIRST, *again) == 0, number
        assert read_generation(folder) == (2, 5), number
        assert {path.name for path in folder.iterdir()} == {"_SUCCESS", "part-00000-g2.parquet"}, number
    assert number > 10


def test_prune_removes_what_the_ledgers_list_and_nothing_else(three: Nights, capsys) -> None:
    for day in ("2026-10-01", "2026-10-02", FIRST, SECOND):
        assert three.make(day) == 0
    foreign = three.table / "images" / "run_date=2026-10-02" / "notes.txt"
    foreign.write_text("mine")
    before = written_at(three.table)
    assert main(["prune", str(three.table), "--keep-days", "28", "--dry-run"]) == 0
    assert written_at(three.table) == before
    assert "2026-10-01: would remove" in capsys.readouterr().out
    assert main(["prune", str(three.table), "--keep-days", "28"]) == 0
    assert "notes.txt" in capsys.readouterr().out
    left = {path for path in before if path.exists()}
    assert foreign in left
    assert {path for path in left if "2026-10" in str(path)} == {foreign}
    assert not (three.table / "state" / "run_date=2026-10-01").exists()
    assert main(["verify", str(three.table)]) == 0
    assert three.make(THIRD) == 0  # carried from a night that is gone, by those that are left
    assert set(three.carried(THIRD).values()) == {"2026-10-01"}


def test_verify_notices_a_changed_file_and_an_unfinished_date(three: Nights, capsys) -> None:
    assert three.make(FIRST) == 0
    assert main(["verify", str(three.table)]) == 0
    (three.table / "images" / f"run_date={FIRST}" / "_SUCCESS").unlink()
    assert main(["verify", str(three.table)]) == 1
    assert "_SUCCESS is missing" in " ".join(capsys.readouterr().out.split())
    assert three.make(FIRST) == 0
    assert main(["verify", str(three.table)]) == 0


def test_a_night_killed_after_everything_was_carried_is_finished(
    three: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_here(three, FIRST) == 0
    put = LocalStorage.put

    def dying(self: LocalStorage, path: str, payload: bytes) -> None:
        if path.endswith("carry.json"):
            raise Crash
        put(self, path, payload)

    with monkeypatch.context() as patched:
        patched.setattr(LocalStorage, "put", dying)
        with pytest.raises(Crash):
            make_here(three, SECOND)
    assert make_here(three, SECOND) == 0
    assert set(three.carried(SECOND).values()) == {FIRST}


def test_an_unfinished_run_of_another_inventory_is_replaced_and_pruned_with_its_date(
    three: Nights, server: EtagServer, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    old = "2026-10-01"
    with monkeypatch.context() as patched:
        patched.setattr(run_nightly.nights, "publish_night", crash)
        with pytest.raises(Crash):
            make_here(three, old)
    three.list_images([server.url("/0.png")])
    assert three.make(old) == 2
    assert "--replace" in capsys.readouterr().err
    assert three.make(old, "--replace") == 0
    assert len(three.rows(old)) == 1
    assert three.make(FIRST) == 0
    assert main(["prune", str(three.table), "--keep-days", "28"]) == 0
    assert not [path for path in three.table.rglob("*") if old in str(path)]


def prune_until(monkeypatch: pytest.MonkeyPatch, table: Path, number: int) -> int | None:
    """Prune, and die before the n-th file is written or deleted; the exit code, None after a death."""
    done, put, delete = 0, LocalStorage.put, LocalStorage.delete

    def count() -> None:
        nonlocal done
        done += 1
        if done == number:
            raise Crash

    def counting_put(self: LocalStorage, path: str, payload: bytes) -> None:
        count()
        put(self, path, payload)

    def counting_delete(self: LocalStorage, *paths: str) -> None:
        for path in paths:
            count()
            delete(self, path)

    with monkeypatch.context() as patched:
        patched.setattr(LocalStorage, "put", counting_put)
        patched.setattr(LocalStorage, "delete", counting_delete)
        try:
            return prune_table.run(parse("prune", [str(table), "--keep-days", "28"]))
        except Crash:
            return None


@pytest.mark.slow
def test_a_prune_killed_at_any_file_is_finished_by_the_next_one(
    three: Nights, server: EtagServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced, old = "2026-09-01", "2026-10-01"
    with monkeypatch.context() as patched:
        patched.setattr(run_nightly.nights, "publish_night", crash)
        with pytest.raises(Crash):
            make_here(three, replaced)
    three.list_images([server.url("/0.png")])
    assert three.make(replaced, "--replace") == 0  # of two runs, the first is not finished
    for day in (old, FIRST):
        assert three.make(day) == 0
    original = three.folder / "original"
    shutil.copytree(three.table, original)
    for number in range(1, 1000):
        shutil.rmtree(three.table)
        shutil.copytree(original, three.table)
        if prune_until(monkeypatch, three.table, number) == 0:
            break
        for day in (replaced, old):
            found = read_generation(three.table / "images" / f"run_date={day}")
            assert found in (None, (2, 1) if day == replaced else (1, 1)), number
        assert prune_until(monkeypatch, three.table, 0) == 0, number
        assert [path.name for path in (three.table / "images").iterdir()] == [f"run_date={FIRST}"], number
        assert [path.name for path in (three.table / "state").iterdir()] == [f"run_date={FIRST}"], number
    assert number > 20
    assert main(["verify", str(three.table)]) == 0


def test_a_date_that_is_being_removed_is_there_for_nobody(three: Nights, capsys) -> None:
    old = "2026-10-01"
    for day in (old, FIRST):
        assert three.make(day) == 0
    (three.table / "state" / f"run_date={old}" / "removing.json").write_text('{"table": [], "state": []}')
    assert three.make(old) == 2
    assert "`prune`" in capsys.readouterr().err
    assert main(["verify", str(three.table)]) == 0
    assert old not in capsys.readouterr().out
    assert three.make(SECOND) == 0
    assert set(three.carried(SECOND).values()) == {old}, "the rows of the first night say so themselves"


def leave_empty_marker(images: Path, state: Path) -> None:
    (images / "_SUCCESS").write_bytes(b"")


def leave_other_marker(images: Path, state: Path) -> None:
    (images / "_SUCCESS").write_bytes(b'["part-0.parquet"]')


def lose_state(images: Path, state: Path) -> None:
    shutil.rmtree(state)


def lose_ledger_entry(images: Path, state: Path) -> None:
    (state / "ledger" / "000001.json").unlink()


@pytest.mark.parametrize("damage", [leave_empty_marker, leave_other_marker, lose_state, lose_ledger_entry])
def test_a_damaged_date_stops_no_other_night_and_no_prune(
    three: Nights, damage: Callable[[Path, Path], None], caplog
) -> None:
    damaged, old = "2026-09-01", "2026-10-01"
    inventory = three.folder / "inventory.parquet"
    for day in (damaged, old, FIRST):
        publish_made_up_night(inventory, three.bundle, three.table, date.fromisoformat(day))
    images, state = (three.table / room / f"run_date={damaged}" for room in ("images", "state"))
    damage(images, state)
    assert three.make(SECOND) == 0
    assert set(three.carried(SECOND).values()) == {damaged}, "as the night between says"
    assert main(["verify", str(three.table)]) == 1
    assert main(["prune", str(three.table), "--keep-days", "28"]) == 0
    assert not (three.table / "images" / f"run_date={old}").exists()
    warned = [message for message in caplog.messages if str(images) in message]
    assert len(warned) == 1 and str(state) in warned[0], warned


def test_a_folder_of_no_date_is_named_and_left_out(three: Nights, caplog) -> None:
    inventory = three.folder / "inventory.parquet"
    publish_made_up_night(inventory, three.bundle, three.table, date.fromisoformat(FIRST))
    for room in ("images", "state"):
        folder = three.table / room / "run_date=2026-13-45"
        folder.mkdir()
        (folder / "_SUCCESS").write_text("{}")
    assert three.make(SECOND) == 0
    assert main(["prune", str(three.table), "--keep-days", "28"]) == 0
    assert main(["verify", str(three.table)]) == 0
    assert len([message for message in caplog.messages if "images/run_date=2026-13-45" in message]) == 1


def test_tonights_own_folder_that_is_no_night_is_wrong_input(three: Nights, capsys) -> None:
    own = three.table / "images" / f"run_date={FIRST}"
    own.mkdir(parents=True)
    (own / "_SUCCESS").write_bytes(b"")
    assert three.make(FIRST) == 2
    said = capsys.readouterr().err
    assert str(own) in said and "remove" in said


def crash(*_: object, **__: object) -> None:
    raise Crash


def test_a_night_killed_after_its_plan_begins_again_with_another_inventory(
    three: Nights, server: EtagServer, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "open", crash)
        with pytest.raises(Crash):
            make_here(three, FIRST)
    three.list_images([server.url("/0.png")])
    assert three.make(FIRST) == 2
    said = capsys.readouterr().err
    assert "--replace" in said
    assert "output folder" not in said
    assert three.make(FIRST, "--replace") == 0
    assert len(three.rows(FIRST)) == 1
    assert three.report(FIRST)["generation"] == 1
    assert main(["verify", str(three.table)]) == 0


def test_a_night_whose_files_go_away_meanwhile_is_made_by_the_same_command(
    three: Nights, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    assert three.make(FIRST) == 0
    folder, aside = three.table / "images" / f"run_date={FIRST}", three.folder / "aside"
    carry_rows = nights_of_a_date.carry_rows

    def carry_from_nothing(*given: Any) -> None:
        folder.rename(aside)
        carry_rows(*given)

    with monkeypatch.context() as patched:
        patched.setattr(nights_of_a_date, "carry_rows", carry_from_nothing)
        assert three.make(SECOND) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("iab-vision nightly: ")
    assert said.endswith("the same command works again")
    aside.rename(folder)
    assert three.make(SECOND) == 0
    assert set(three.carried(SECOND).values()) == {FIRST}


def test_an_empty_inventory_is_a_night_of_no_rows(three: Nights) -> None:
    inventory = (three.folder / "inventory.parquet").read_bytes()
    three.list_images([], etag=[])
    assert three.make(FIRST) == 0
    (three.folder / "inventory.parquet").write_bytes(inventory)
    assert three.make(SECOND) == 0
    three.list_images([], etag=[])
    assert three.make(THIRD) == 0
    assert [len(three.rows(day)) for day in (FIRST, SECOND, THIRD)] == [0, 5, 0]
    assert three.report(THIRD)["night"]["images"]["removed"] == 5
