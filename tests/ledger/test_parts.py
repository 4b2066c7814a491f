"""Parts, their repair, and a published table that every reader understands."""

from pathlib import Path

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipelines import schema
from pipelines.ledger.entries import Phase
from pipelines.ledger.ledger import LedgerLost
from pipelines.ledger.parts import (
    Committer,
    read_part,
    read_result,
    write_batch,
    write_part,
)
from pipelines.ledger.publish import find_failed_items
from pipelines.messages import InputError, JobFailed
from pipelines.storage.storage import open_storage
from tests.builders.predictions import CARRIED, SmallRun, paused_in_the_put, row, scored, small_run

FAILING = {7: "timeout", 9: "server_error", 10: "not_found"}


@pytest.fixture
def run(tmp_path: Path) -> SmallRun:
    return small_run(tmp_path / "predictions")


def finished(run: SmallRun) -> SmallRun:
    """Classified in four overlapping parts, three items failing, and published in several files."""
    ledger = run.ledger()
    committer = Committer(ledger, run.state, every_s=0)
    for item_ids in ([5, 3, 4], range(4, 12), [2, 0, 1], range(9, 20)):
        committer.add(run.write(item_ids, lambda item_id: FAILING.get(item_id, "ok")))
    committer.flush()
    run.publish(ledger)
    return run


def table_of(run: SmallRun) -> pa.Table:
    return ds.dataset(f"{run.uri}/table", format="parquet").to_table().sort_by([("image_id", "ascending")])


def test_a_part_holds_every_row_of_its_items_with_the_carried_columns_untouched(run: SmallRun) -> None:
    part = run.write([4, 3])
    table = read_part(part, run.state)
    assert part.items == ((3, 5),)
    assert part.rows == table.num_rows == 3
    assert table.select(["image_id", *CARRIED.names]).to_pylist() == [row(3, 0), row(3, 1), row(4, 0)]
    assert table["uri"].to_pylist()[-1] == "https://host0.example/4.jpg"


def test_an_item_that_a_retried_task_delivers_twice_is_written_once(run: SmallRun) -> None:
    part = run.write([2, 1, 2, 2])
    assert (part.rows, part.items) == (2, ((1, 3),))


def test_an_all_failed_part_has_the_same_schema_as_any_other(run: SmallRun) -> None:
    good, bad = run.write([0, 1]), run.write([2, 3], lambda item_id: "not_found")
    assert read_part(good, run.state).schema == read_part(bad, run.state).schema
    assert bad.statuses == {"not_found": 3}
    assert bad.hosts == {"host3.example": 2, "host2.example": 1}


def test_passing_failures_wait_for_a_later_pass_and_lasting_ones_do_not(run: SmallRun) -> None:
    scores = scored(range(6, 12), lambda item_id: FAILING.get(item_id, "ok"))
    written = write_part(scores, run.plan, run.state, run.context(final=False))
    assert written.deferred == ((7, 8), (9, 10))
    assert written.part is not None
    assert written.part.items == ((6, 7), (8, 9), (10, 12))


def test_a_batch_of_passing_failures_alone_writes_no_file(run: SmallRun) -> None:
    rows = write_batch(scored([7, 9], lambda item_id: "timeout"), run.context(final=False)).to_pylist()
    written = read_result(rows[0])
    assert written.part is None
    assert written.deferred == ((7, 8), (9, 10))
    assert run.state.list("parts") == []


def test_write_batch_carries_the_part_to_the_driver_as_text(run: SmallRun) -> None:
    rows = write_batch(scored([3, 4]), run.context()).to_pylist()
    part = read_result(rows[0]).part
    assert part is not None
    assert read_part(part, run.state).num_rows == part.rows


def test_a_batch_whose_images_answer_for_many_rows_becomes_several_parts(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.ledger.parts.ROWS_AT_ONCE", 6)
    monkeypatch.setattr("pipelines.ledger.parts.ITEMS_AT_ONCE", 2)
    rows = write_batch(scored([*range(13), 3, 0], lambda item_id: FAILING.get(item_id, "ok")), run.context())
    parts = [read_result(row).part for row in rows.to_pylist()]
    assert [part.items for part in parts if part] == [((0, 4),), ((4, 8),), ((8, 12),), ((12, 13),)]
    assert [part.rows for part in parts if part] == [6, 5, 5, 2]


def test_the_committer_cuts_out_what_is_recorded_or_pending(run: SmallRun) -> None:
    ledger = run.ledger()
    committer = Committer(ledger, run.state, every_s=1000)
    first = run.write([0, 1, 2])
    committer.add(first)
    committer.flush()
    assert committer.add(run.write([2, 3])).items == ((3, 4),)
    assert committer.add(run.write([3, 1])) is None
    assert committer.add(run.write([3, 4, 5])).items == ((4, 6),)
    committer.flush()
    assert ledger.done.missing() == [(6, 20)]
    assert [part.rows for part in run.ledger().state.parts] == [first.rows, 2, 2]


def test_the_committer_writes_every_few_seconds_and_not_more_often(run: SmallRun) -> None:
    now = [0.0]
    ledger = run.ledger()
    committer = Committer(ledger, run.state, every_s=5, clock=lambda: now[0])
    for item in range(12):
        committer.add(run.write([item]))
        now[0] += 1
    assert ledger.state.entries == 2
    committer.flush()
    assert ledger.state.entries == 3


def test_publish_before_everything_is_recorded_is_refused(run: SmallRun) -> None:
    ledger = run.ledger()
    ledger.record([run.write(range(19))])
    with pytest.raises(ValueError, match="1 of 20"):
        run.publish(ledger)


def test_publish_refuses_a_folder_with_files_of_somebody_else(run: SmallRun) -> None:
    run.table.put("old.parquet", b"not ours")
    with pytest.raises(InputError, match=r"old\.parquet"):
        finished(run)
    assert run.table.read("old.parquet") == b"not ours"


def test_a_published_run_keeps_no_parts_and_publishing_again_changes_nothing(run: SmallRun) -> None:
    finished(run)
    before = {entry.path: (entry.last_modified, entry.size) for entry in run.table.list()}
    ledger = run.ledger()
    run.publish(ledger)
    assert {entry.path: (entry.last_modified, entry.size) for entry in run.table.list()} == before
    assert run.state.list("parts") == []
    assert "_SUCCESS" in before
    assert len(before) > 2


def test_an_empty_inventory_publishes_an_empty_table_with_the_schema(tmp_path: Path) -> None:
    run = small_run(tmp_path, 0)
    run.publish(run.ledger())
    assert pq.read_schema(f"{run.uri}/table/part-00000.parquet").equals(schema.predictions_schema(CARRIED))
    assert duckdb.sql(f"select count(*) from '{run.uri}/table/*.parquet'").fetchall() == [(0,)]


def test_polars_pandas_duckdb_and_pyarrow_read_the_published_rows_exactly(run: SmallRun) -> None:
    expected = table_of(finished(run))
    folder, glob = f"{run.uri}/table", f"{run.uri}/table/*.parquet"
    readings = {
        "polars folder": pl.read_parquet(f"{folder}/").to_arrow(),
        "polars glob": pl.read_parquet(glob).to_arrow(),
        "pandas folder": pa.Table.from_pandas(pd.read_parquet(folder), schema=expected.schema),
        "duckdb glob": duckdb.sql(f"select * from '{glob}'").to_arrow_table(),
        "pyarrow folder": pq.read_table(folder),
    }
    for reader, found in readings.items():
        ordered = found.sort_by([("image_id", "ascending")])
        assert ordered.num_rows == run.plan.n_rows, reader
        for name in expected.column_names:
            assert ordered[name].to_pylist() == expected[name].to_pylist(), (reader, name)


def test_duckdb_reads_the_folder_as_documented(run: SmallRun) -> None:
    finished(run)
    counted = duckdb.sql(f"select status, count(*) from '{run.uri}/table/*.parquet' group by 1 order by 1")
    assert counted.fetchall() == [("not_found", 1), ("ok", 23), ("server_error", 2), ("timeout", 1)]


def test_a_rerun_replaces_failed_rows_where_they_stand_and_leaves_other_files_alone(
    run: SmallRun,
) -> None:
    before = table_of(finished(run))
    old_files = {entry.path: run.table.read(entry.path) for entry in run.table.list()}
    ledger = run.ledger()
    items = find_failed_items(ledger, run.plan, run.table)
    assert items == [(7, 8), (9, 10)]
    ledger.start_generation(items)
    ledger.record([run.write([9, 7], lambda item_id: "denied" if item_id == 9 else "ok", generation=2)])
    run.publish(ledger)
    after = table_of(run)
    assert after["image_id"].equals(before["image_id"])
    changed = set(after.filter(pc.not_equal(after["status"], before["status"]))["image_id"].to_pylist())
    assert changed == {"image-7-0", "image-9-0", "image-9-1"}
    rewritten = {name for name, payload in old_files.items() if run.table.read(name) != payload}
    assert 0 < len(rewritten) < len(old_files) - 1
    assert set(old_files) == {entry.path for entry in run.table.list()}
    assert find_failed_items(run.ledger(), run.plan, run.table) == []


def test_a_rerun_interrupted_after_a_file_was_replaced_ends_the_same(run: SmallRun) -> None:
    finished(run)
    ledger = run.ledger()
    ledger.start_generation(find_failed_items(ledger, run.plan, run.table))
    ledger.record([run.write([7, 9], generation=2)])
    unfinished = {entry.path: run.state.read(entry.path) for entry in run.state.list()}
    run.publish(ledger)
    published = {entry.path: run.table.read(entry.path) for entry in run.table.list()}
    run.state.delete(*[e.path for e in run.state.list("ledger") if e.path not in unfinished])
    for path, payload in unfinished.items():
        run.state.put(path, payload)
    run.publish(run.ledger())
    assert {entry.path: run.table.read(entry.path) for entry in run.table.list()} == published


def test_a_rerun_refuses_to_build_on_an_altered_file(run: SmallRun) -> None:
    finished(run)
    ledger = run.ledger()
    ledger.start_generation(find_failed_items(ledger, run.plan, run.table))
    ledger.record([run.write([7, 9], generation=2)])
    for name in ledger.state.files:
        original = pq.read_table(f"{run.uri}/table/{name}")
        pq.write_table(original, f"{run.uri}/table/{name}", compression="snappy")
    with pytest.raises(JobFailed, match="altered after it was published"):
        run.publish(ledger)
    assert ledger.state.phase is Phase.PUBLISHING


def test_a_publisher_that_was_paused_does_not_write_over_a_rerun(run: SmallRun) -> None:
    with pytest.raises(LedgerLost, match="another driver"):
        paused_in_the_put(run)
    assert set(table_of(run)["status"].to_pylist()) == {"ok"}


def test_rows_per_file_bounds_the_files(run: SmallRun) -> None:
    finished(run)
    rows = [pq.read_metadata(f"{run.uri}/table/{name}").num_rows for name in run.ledger().state.files]
    assert sum(rows) == run.plan.n_rows
    assert len(rows) > 1


def test_the_whole_story_on_a_storage_without_conditional_put(tmp_path: Path) -> None:
    run = finished(small_run(f"memory://{tmp_path.name}/predictions"))
    files = [entry.path for entry in open_storage(f"{run.uri}/table").list()]
    assert files[0] == "_SUCCESS"
    assert run.state.list("parts") == []
