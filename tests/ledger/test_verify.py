"""Verify notices everything that can go wrong with a published table."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.verify_output import print_checks
from pipelines.ledger.publish import find_failed_items
from pipelines.ledger.verify import Check, verify
from pipelines.messages import InputError
from pipelines.storage.storage import sha256_of
from tests.builders.predictions import SmallRun, small_run


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    run = small_run(tmp_path_factory.mktemp("original") / "predictions")
    ledger = run.ledger()
    ledger.announce()
    for item_ids in (range(7, 14), range(7), range(14, 20)):
        ledger.record([run.write(item_ids, lambda item_id: "timeout" if item_id == 8 else "ok")])
    run.publish(ledger)
    report = {"rows": 27, "statuses": {"ok": 26, "timeout": 1}}
    run.state.put("report.json", json.dumps(report).encode())
    return run


@pytest.fixture
def run(original: SmallRun, tmp_path: Path) -> SmallRun:
    """A copy to damage."""
    shutil.copytree(original.uri, tmp_path / "predictions")
    return SmallRun(str(tmp_path / "predictions"), original.plan)


def failed(report: list[Check]) -> set[str]:
    return {check.name for check in report if not check.ok}


def test_a_whole_table_passes_every_check(run: SmallRun) -> None:
    report = verify(run.uri)
    assert all(check.ok for check in report), report
    names = [check.name for check in report]
    assert names == ["plan", "run", "ledger", "published", "files", "images", "checksums", "rows", "report"]


def test_a_folder_that_classify_did_not_write_is_not_a_failed_check(tmp_path: Path) -> None:
    (tmp_path / "out" / "table").mkdir(parents=True)
    with pytest.raises(InputError, match=f"give the folder above, {tmp_path}/out$"):
        verify(str(tmp_path / "out" / "table"))
    with pytest.raises(InputError, match="not written by classify"):
        verify(str(tmp_path))


def first_file(run: SmallRun) -> Path:
    return Path(run.uri) / "table" / "part-00000.parquet"


def delete_part(run: SmallRun) -> None:
    first_file(run).unlink()


def duplicate_part(run: SmallRun) -> None:
    shutil.copy(first_file(run), first_file(run).with_name("part-00099.parquet"))


def change_a_byte(run: SmallRun) -> None:
    payload = bytearray(first_file(run).read_bytes())
    payload[len(payload) // 3] ^= 1
    first_file(run).write_bytes(payload)


def double_a_row(run: SmallRun) -> None:
    rewrite(run, lambda table: pa.concat_tables([table.slice(0, 1), table]))


def lose_a_row(run: SmallRun) -> None:
    rewrite(run, lambda table: table.slice(1))


def swap_two_rows(run: SmallRun) -> None:
    rewrite(run, lambda table: table.take([1, 0, *range(2, table.num_rows)]))


def drop_a_column(run: SmallRun) -> None:
    rewrite(run, lambda table: table.drop_columns(["publisher_id"]))


def rewrite(run: SmallRun, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(first_file(run))), first_file(run))


def lose_an_entry(run: SmallRun) -> None:
    run.state.delete("ledger/000002.json")


def lose_the_last_entry(run: SmallRun) -> None:
    run.state.delete(run.state.list("ledger")[-1].path)


def change_an_entry(run: SmallRun) -> None:
    path = run.state.list("ledger")[-1].path
    run.state.put(path, run.state.read(path).replace(b'"nonce":"', b'"nonce":"0'))


def add_a_file(run: SmallRun) -> None:
    run.table.put("notes.txt", b"hello")


def add_a_hidden_file(run: SmallRun) -> None:
    run.table.put("_extra/part-00000.parquet", b"hello")


def remove_the_marker(run: SmallRun) -> None:
    run.table.delete("_SUCCESS")


def change_the_report(run: SmallRun) -> None:
    run.state.put("report.json", b'{"rows": 27, "statuses": {"ok": 27}}')


def lose_the_report(run: SmallRun) -> None:
    run.state.delete("report.json")


def change_the_plan(run: SmallRun) -> None:
    path = Path(run.uri) / "state" / run.plan.files[0].path
    payload = bytearray(path.read_bytes())
    payload[len(payload) // 3] ^= 1
    path.write_bytes(payload)


def lose_the_plan(run: SmallRun) -> None:
    run.state.delete("plan/plan.json")


def swap_the_plan(run: SmallRun, n_items: int = 20) -> None:
    """Another plan, whole in itself; of as many images unless told otherwise."""
    shutil.rmtree(Path(run.uri) / "state" / "plan")
    other = small_run(f"{run.uri}-other", n_items, host="elsewhere")
    shutil.copytree(Path(other.uri) / "state" / "plan", Path(run.uri) / "state" / "plan")


def swap_the_plan_for_a_shorter_one(run: SmallRun) -> None:
    swap_the_plan(run, 12)


def forge_the_plan(run: SmallRun) -> None:
    """Another plan's files under the hash that the run was begun with."""
    swap_the_plan(run)
    forged = json.loads(run.state.read("plan/plan.json")) | {"hash": run.plan.hash}
    run.state.put("plan/plan.json", json.dumps(forged).encode())


def lose_the_run(run: SmallRun) -> None:
    run.state.delete("run.json")


@pytest.mark.parametrize(
    ("damage", "noticed_by"),
    [
        (delete_part, {"files", "checksums", "rows"}),
        (duplicate_part, {"files"}),
        (double_a_row, {"checksums", "rows"}),
        (lose_a_row, {"checksums", "rows"}),
        (swap_two_rows, {"checksums", "rows"}),
        (drop_a_column, {"checksums", "rows"}),
        (lose_an_entry, {"ledger"}),
        (lose_the_last_entry, {"published"}),
        (change_an_entry, {"ledger"}),
        (add_a_file, {"files"}),
        (add_a_hidden_file, {"files"}),
        (remove_the_marker, {"published"}),
        (change_the_report, {"report"}),
        (lose_the_report, {"report"}),
        (change_the_plan, {"plan"}),
        (lose_the_plan, {"plan"}),
        (forge_the_plan, {"plan"}),
        (swap_the_plan, {"run", "rows"}),
        (swap_the_plan_for_a_shorter_one, {"run", "ledger"}),
        (lose_the_run, {"run"}),
    ],
)
def test_damage_is_noticed_by_the_check_that_names_it(
    run: SmallRun, damage: Callable[[SmallRun], None], noticed_by: set[str]
) -> None:
    damage(run)
    assert failed(verify(run.uri)) == noticed_by


def test_every_changed_byte_of_a_table_file_is_noticed(run: SmallRun) -> None:
    change_a_byte(run)
    assert "checksums" in failed(verify(run.uri))


def test_rows_are_compared_with_the_plan_even_when_the_checksum_was_forged(run: SmallRun) -> None:
    """Checksums alone would trust whatever the ledger says; the rows must be the plan's too."""
    ledger = run.ledger()
    ledger.start_generation(find_failed_items(ledger, run.plan, run.table))
    ledger.record([run.write([8], generation=2)])
    ledger.close(8)
    swap_two_rows(run)
    listed = ledger.state.files["part-00000.parquet"]
    ledger.record_file(replace(listed, generation=2, sha256=sha256_of(run.table, listed.name)))
    ledger.publish()
    assert failed(verify(run.uri)) == {"rows"}


def test_an_unfinished_run_says_how_far_it_is_and_what_was_not_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run(tmp_path)
    run.ledger().record([run.write(range(5))])
    checks = {check.name: check for check in verify(run.uri)}
    assert checks["published"].detail.startswith("generation 1 is still running, 15 images are not recorded")
    print_checks(list(checks.values()))
    shown = [line for line in capsys.readouterr().out.splitlines() if "not checked" in line]
    assert [line.split()[1] for line in shown] == ["checksums", "rows"]


def test_a_rerun_that_was_not_finished_is_noticed(run: SmallRun) -> None:
    ledger = run.ledger()
    ledger.start_generation(find_failed_items(ledger, run.plan, run.table))
    assert failed(verify(run.uri)) == {"published"}


@pytest.mark.parametrize(
    ("path", "payload", "noticed_by"),
    [
        ("run.json", b"{", "run"),
        ("run.json", b"[]", "run"),
        ("report.json", b"\xff", "report"),
        ("plan/plan.json", b"not JSON", "plan"),
        ("plan/plan.json", b'{"format_version": 4}', "plan"),
    ],
)
def test_a_file_of_the_state_that_cannot_be_read_is_a_failed_check(
    run: SmallRun, path: str, payload: bytes, noticed_by: str
) -> None:
    run.state.put(path, payload)
    assert noticed_by in failed(verify(run.uri))
