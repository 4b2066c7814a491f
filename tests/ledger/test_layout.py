"""A table of generations: new names, a manifest, and readers that never see a mixture."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.ledger.entries import LedgerState, TableFile
from pipelines.ledger.layout import (
    GENERATIONS,
    PLAIN,
    SUCCESS,
    decode_manifest,
    detect_layout,
    encode_manifest,
    find_superseded,
    rename_file,
)
from pipelines.ledger.ledger import Ledger, LedgerLost
from pipelines.ledger.publish import find_failed_items, publish
from pipelines.ledger.verify import verify
from pipelines.messages import InputError
from pipelines.storage.storage import Storage, open_storage
from tests.builders.hooked_storage import HookedStorage
from tests.builders.predictions import SmallRun, small_run

WRITES = ("put", "put_file_over", "create", "delete")


class Crash(BaseException):
    """The process is gone."""


def listed(name: str, generation: int = 1) -> TableFile:
    return TableFile(name, "0" * 64, 1, ((0, 1),), 1, {"ok": 1}, {}, generation)


def test_a_plain_file_keeps_its_name_and_one_of_generations_gets_a_new_one() -> None:
    assert rename_file(listed("part-00007.parquet"), 2, PLAIN) == "part-00007.parquet"
    assert rename_file(listed("part-00007-g1.parquet"), 12, GENERATIONS) == "part-00007-g12.parquet"
    with pytest.raises(ValueError, match="notes"):
        rename_file(listed("notes.parquet"), 2, PLAIN)


def test_superseded_files_are_those_of_earlier_generations_that_the_ledger_does_not_list() -> None:
    names = [
        "part-00000-g1.parquet", "part-00001-g1.parquet", "part-00001-g2.parquet", "part-00001-g3.parquet",
        "part-00002.parquet", "mine-g1.parquet", "_SUCCESS",
    ]  # fmt: skip
    files = {name: listed(name) for name in ("part-00000-g1.parquet", "part-00001-g2.parquet")}
    state = LedgerState(generation=2, files=files)
    assert find_superseded(names, state, GENERATIONS) == ["part-00001-g1.parquet"]
    assert find_superseded(names, state, PLAIN) == []


def test_the_layout_shows_in_the_names() -> None:
    assert detect_layout(["part-00000.parquet"]) is PLAIN
    assert detect_layout(["part-00000-g3.parquet"]) is GENERATIONS
    assert detect_layout([]) is PLAIN


def test_the_manifest_lists_the_files_that_count_by_name() -> None:
    files = {name: listed(name) for name in ("part-00001-g2.parquet", "part-00000-g1.parquet")}
    manifest = decode_manifest(encode_manifest(LedgerState(generation=2, files=files)))
    assert manifest["generation"] == 2
    assert [file["name"] for file in manifest["files"]] == ["part-00000-g1.parquet", "part-00001-g2.parquet"]
    assert manifest["files"][0] == {"name": "part-00000-g1.parquet", "rows": 1, "sha256": "0" * 64}


@pytest.fixture
def run(tmp_path: Path) -> SmallRun:
    """Published as generation 1; item 7 failed for a passing reason."""
    run = small_run(tmp_path / "night")
    ledger = run.ledger()
    ledger.announce()
    for items in (range(5), range(5, 12), range(12, 20)):
        ledger.record([run.write(items, lambda item_id: "timeout" if item_id == 7 else "ok")])
    run.publish(ledger, rows_per_file=4, layout=GENERATIONS)
    return run


def names_of(run: SmallRun) -> list[str]:
    return [entry.path for entry in run.table.list()]


def read_table(table: Storage) -> dict[str, int] | None:
    """Rows by status of the files that the manifest lists; None while there is none, or when it changed."""
    if not table.exists(SUCCESS):
        return None
    payload = table.read(SUCCESS)
    statuses: dict[str, int] = {}
    for file in decode_manifest(payload)["files"]:
        assert hashlib.sha256(table.read(file["name"])).hexdigest() == file["sha256"]
        rows = pq.read_table(table.open_input(file["name"]), columns=["status"])["status"].to_pylist()
        assert len(rows) == file["rows"]
        for status in rows:
            statuses[status] = statuses.get(status, 0) + 1
    return statuses if table.exists(SUCCESS) and table.read(SUCCESS) == payload else None


def verified(run: SmallRun) -> bool:
    return all(check.ok for check in verify(run.uri) if check.name != "report")


OLD, NEW = {"ok": 26, "timeout": 1}, {"ok": 27}


def rerun(run: SmallRun, state: Storage, table: Storage) -> None:
    """What `--retry-failed` does, from wherever an earlier attempt stopped."""
    ledger = run.ledger(state)
    if failed := ledger.state.phase == "published" and find_failed_items(ledger, run.plan, table):
        ledger.start_generation(failed)
    for start, stop in ledger.done.missing():
        ledger.record([run.write(range(start, stop), generation=2, state=state)])
    publish(ledger, run.plan, state, table, rows_per_file=8, layout=GENERATIONS)


def test_a_first_generation_is_published_with_a_manifest(run: SmallRun) -> None:
    assert names_of(run)[1:] == ["part-00000-g1.parquet", "part-00001-g1.parquet", "part-00002-g1.parquet"]
    assert read_table(run.table) == OLD
    assert verified(run)


def test_a_rerun_gives_the_changed_files_new_names_and_removes_the_old_ones(run: SmallRun) -> None:
    rerun(run, run.state, run.table)
    assert names_of(run)[1:] == ["part-00000-g1.parquet", "part-00001-g2.parquet", "part-00002-g1.parquet"]
    assert decode_manifest(run.table.read(SUCCESS))["generation"] == 2
    assert read_table(run.table) == NEW
    assert verified(run)
    before = run.table.list()
    rerun(run, run.state, run.table)
    assert run.table.list() == before


def test_a_reader_of_the_manifest_sees_the_old_rows_the_new_ones_or_none_at_any_moment(run: SmallRun) -> None:
    seen: list[dict[str, int] | None] = []

    def look(operation: str, args: tuple[Any, ...], proceed: Callable[[], Any]) -> Any:
        seen.append(read_table(run.table))
        result = proceed()
        seen.append(read_table(run.table))
        return result

    state: Any = HookedStorage(run.state, look)
    table: Any = HookedStorage(run.table, look)
    rerun(run, state, table)
    moments = [what for index, what in enumerate(seen) if not index or what != seen[index - 1]]
    assert moments == [OLD, None, NEW]


def test_a_crash_at_any_write_of_a_replacement_is_repaired_and_readers_never_see_a_mixture(
    run: SmallRun, tmp_path: Path
) -> None:
    survives, crashed = 0, True
    while crashed:
        shutil.copytree(run.uri, folder := tmp_path / f"crash-{survives}")
        copy = SmallRun(str(folder), run.plan)
        left = [survives]

        def crash(
            operation: str, args: tuple[Any, ...], proceed: Callable[[], Any], left: list[int] = left
        ) -> Any:
            if operation in WRITES:
                left[0] -= 1
                if left[0] < 0:
                    raise Crash
            return proceed()

        state: Any = HookedStorage(copy.state, crash)
        table: Any = HookedStorage(copy.table, crash)
        try:
            rerun(copy, state, table)
            crashed = False
        except Crash:
            assert read_table(copy.table) in (OLD, NEW, None)
        rerun(copy, copy.state, copy.table)
        assert read_table(copy.table) == NEW
        assert verified(copy)
        survives += 1
    assert survives > 8


def test_another_ledger_replaces_the_table_as_a_later_generation(run: SmallRun) -> None:
    state = open_storage(f"{run.uri}/state-2")
    ledger = Ledger.open(state, run.identity, n_items=20, first_generation=2)
    ledger.announce()
    assert Ledger(state, 20).state.generation == 2
    ledger.record([run.write(range(20), generation=2, state=state)])
    publish(ledger, run.plan, state, run.table, rows_per_file=99, layout=GENERATIONS)
    assert names_of(run) == [SUCCESS, "part-00000-g2.parquet"]
    assert read_table(run.table) == NEW


def test_a_paused_driver_does_not_write_an_old_manifest_over_a_newer_one(tmp_path: Path) -> None:
    run = small_run(tmp_path / "night", 3)
    ledger = run.ledger()
    ledger.announce()
    ledger.record([run.write(range(3), lambda item_id: "timeout")])
    overtaken: list[bool] = []

    def overtake(operation: str, args: tuple[Any, ...], proceed: Callable[[], Any]) -> Any:
        if operation == "put_file_over" and args[0] == SUCCESS and not overtaken:
            overtaken.append(True)
            successor = run.ledger()
            run.publish(successor, layout=GENERATIONS)
            rerun(run, run.state, run.table)
        return proceed()

    table: Any = HookedStorage(run.table, overtake)
    with pytest.raises(LedgerLost):
        publish(ledger, run.plan, run.state, table, rows_per_file=8, layout=GENERATIONS)
    assert decode_manifest(run.table.read(SUCCESS))["generation"] == 2


def test_a_driver_whose_rerun_another_has_done_meanwhile_names_the_other(run: SmallRun) -> None:
    late = run.ledger()
    rerun(run, run.state, run.table)
    with pytest.raises(LedgerLost, match="another driver"):
        find_failed_items(late, run.plan, run.table)


def test_a_table_of_generations_refuses_files_of_somebody_else_and_of_later_generations(
    run: SmallRun,
) -> None:
    for name in ("mine.parquet", "part-00009-g3.parquet"):
        run.table.put(name, b"not ours")
        with pytest.raises(InputError, match=name):
            rerun(run, run.state, run.table)
        assert run.table.read(name) == b"not ours"
        run.table.delete(name)


def test_a_manifest_that_was_changed_is_noticed(run: SmallRun) -> None:
    manifest = dict(decode_manifest(run.table.read(SUCCESS)))
    run.table.put(SUCCESS, json.dumps(manifest | {"generation": 7}).encode())
    assert [check.name for check in verify(run.uri) if not check.ok] == ["published", "report"]
