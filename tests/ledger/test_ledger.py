"""What counts, who may say so, and what a damaged or lost ledger says."""

import json
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.ledger.entries import LedgerDamaged, Part, Phase
from pipelines.ledger.item_set import ranges_of
from pipelines.ledger.ledger import Ledger, LedgerLost
from pipelines.messages import InputError
from pipelines.storage.storage import open_storage
from tests.builders.predictions import IDENTITY, SmallRun, small_run


@pytest.fixture
def run(tmp_path: Path) -> SmallRun:
    return small_run(tmp_path / "predictions", 6)


def part(start: int, stop: int, name: str = "") -> Part:
    """A part as the ledger sees it; its file is not read here."""
    return Part(
        name or f"parts/{start}", "0" * 64, 1, ((start, stop),), stop - start, {"ok": stop - start}, {}
    )


def test_a_resume_sees_what_was_recorded(run: SmallRun) -> None:
    first = run.ledger()
    first.announce()
    first.record([part(0, 2), part(4, 5)])
    second = run.ledger()
    assert second.done.missing() == [(2, 4), (5, 6)]
    assert second.state.parts == first.state.parts
    assert second.statuses() == {"ok": 3}


def test_another_run_on_the_folder_is_refused_naming_what_differs(run: SmallRun) -> None:
    run.ledger()
    with pytest.raises(InputError, match=r"top_k was 2 and is now 5") as refusal:
        Ledger.open(run.state, {**run.identity, "top_k": 5}, n_items=6)
    assert "model_id" not in str(refusal.value)


def test_details_may_differ_between_resumes(run: SmallRun) -> None:
    Ledger.open(run.state, run.identity, n_items=6, details={"config": {"workers": 2}})
    Ledger.open(run.state, run.identity, n_items=6, details={"config": {"workers": 4}})
    assert json.loads(run.state.read("run.json"))["config"] == {"workers": 2}


def test_the_driver_that_was_overtaken_stops_at_its_next_word_and_says_by_whom(run: SmallRun) -> None:
    old, new = run.ledger(), run.ledger()
    old.announce()
    with pytest.raises(LedgerLost, match=r"pid \d+.*000000\.json"):
        new.announce()
    new = run.ledger()
    new.announce()
    for word in (lambda: old.record([part(0, 1)]), old.check, old.announce):
        with pytest.raises(LedgerLost):
            word()
    new.record([part(0, 1)])
    assert run.ledger().state.parts == new.state.parts


def test_of_two_drivers_started_at_once_one_goes_on_twenty_times(tmp_path: Path) -> None:
    for race in range(20):
        run = small_run(tmp_path / str(race), 3)
        ledgers = [run.ledger() for _ in range(4)]
        start = threading.Barrier(4)
        lost: list[str] = []

        def drive(ledger: Ledger, start: threading.Barrier = start, lost: list[str] = lost) -> None:
            start.wait()
            try:
                ledger.announce()
                ledger.record([part(0, 3, ledger.state.driver["id"])])
            except LedgerLost as error:
                lost.append(str(error))

        threads = [threading.Thread(target=drive, args=(ledger,)) for ledger in ledgers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(lost) == 3
        assert len(run.ledger().state.parts) == 1


def test_a_part_that_repeats_an_item_is_refused(run: SmallRun) -> None:
    ledger = run.ledger()
    ledger.record([part(0, 3)])
    with pytest.raises(ValueError, match="repeat recorded items"):
        ledger.record([part(2, 4)])
    with pytest.raises(ValueError, match="repeat recorded items"):
        ledger.record([part(3, 5, "a"), part(4, 6, "b")])
    assert ledger.done.missing() == [(3, 6)]


def test_a_closed_ledger_takes_no_parts(run: SmallRun) -> None:
    ledger = run.ledger()
    ledger.record([part(0, 6)])
    ledger.close(10)
    with pytest.raises(LedgerDamaged, match="already publishing"):
        ledger._append("parts", parts=[])
    assert run.ledger().state.phase is Phase.PUBLISHING


def test_it_does_not_close_while_items_are_missing(run: SmallRun) -> None:
    ledger = run.ledger()
    ledger.record([part(0, 5)])
    with pytest.raises(ValueError, match="1 of 6 items"):
        ledger.close(10)


class Interrupted(BaseException):
    """What a signal handler raises."""


@pytest.mark.parametrize("late", [False, True])
def test_a_signal_in_mid_write_costs_nothing_when_the_record_is_repeated(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    state = run.state
    ledger = run.ledger(state)
    create = type(state).create

    def interrupted(self: object, path: str, payload: bytes) -> None:
        if late:
            create(state, path, payload)
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(type(state), "create", interrupted)
        with pytest.raises(Interrupted):
            ledger.record([part(0, 2)])
    ledger.record([part(0, 2)])
    ledger.record([part(2, 3)])
    again = run.ledger()
    assert again.state.entries == 2
    assert [each.path for each in again.state.parts] == ["parts/0", "parts/2"]


@pytest.mark.parametrize("damage", ["gap", "byte", "cut", "swap"])
def test_a_lost_altered_torn_or_exchanged_entry_is_noticed(run: SmallRun, damage: str) -> None:
    ledger = run.ledger()
    ledger.announce()
    ledger.record([part(0, 2)])
    ledger.record([part(2, 4)])
    folder = Path(run.uri) / "state" / "ledger"
    first, second = folder / "000001.json", folder / "000002.json"
    if damage == "gap":
        first.unlink()
    elif damage == "byte":
        first.write_bytes(first.read_bytes().replace(b'"rows":2', b'"rows":3'))
    elif damage == "cut":
        second.write_bytes(second.read_bytes()[:-9])
    else:
        one, two = first.read_bytes(), second.read_bytes()
        first.write_bytes(two)
        second.write_bytes(one)
    with pytest.raises(LedgerDamaged):
        run.ledger()


def test_entries_are_json_that_any_tool_reads(run: SmallRun) -> None:
    ledger = run.ledger()
    ledger.record([part(0, 2)])
    entry = json.loads(run.state.read("ledger/000000.json"))
    assert entry["kind"] == "parts"
    assert entry["parts"][0]["items"] == [[0, 2]]


def test_reopening_needs_a_published_run_and_starts_a_generation(run: SmallRun) -> None:
    ledger = run.ledger()
    ledger.record([part(0, 6)])
    with pytest.raises(ValueError, match="only failed rows of a published run"):
        ledger.start_generation([(1, 2)])
    ledger.close(10)
    ledger.publish()
    ledger.start_generation([(1, 2), (4, 5)])
    again = run.ledger()
    assert (again.state.generation, again.state.phase) == (2, Phase.RUNNING)
    assert again.done.missing() == [(1, 2), (4, 5)]
    assert again.state.parts == ()


def test_a_storage_without_conditional_put_still_keeps_a_ledger(tmp_path: Path) -> None:
    state = open_storage(f"memory://{tmp_path.name}/state")
    ledger = Ledger.open(state, IDENTITY, n_items=4)
    ledger.record([part(0, 4)])
    assert Ledger.open(state, IDENTITY, n_items=4).done.full


def test_scattered_items_of_a_resumed_run_cost_sixteen_bytes_each(tmp_path: Path) -> None:
    """A pass that defers one image in ten leaves a range for each: of ten million images, a million."""
    n_items, identity = 200_000, {"top_k": 2}
    first = Ledger.open(open_storage(str(tmp_path)), identity, n_items=n_items)
    for start in range(0, n_items, 5_000):
        kept = np.delete(np.arange(start, start + 5_000), np.s_[::10])
        first.record([replace(part(start, start + 5_000), items=ranges_of(kept))])
    tracemalloc.start()
    try:
        second = Ledger.open(open_storage(str(tmp_path)), identity, n_items=n_items)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert second.state.parts == first.state.parts
    assert sum(len(each.items) for each in second.state.parts) == n_items // 10
    assert used <= 30 * n_items // 10
