"""A second driver of a run: it refuses while the first is alive, and takes over once it is not."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipelines.ledger.driver import Driver, identify_driver, is_running
from pipelines.ledger.entries import encode
from pipelines.ledger.ledger import Ledger, LedgerLost
from pipelines.ledger.takeover import DRIVER_JSON, hold_run, read_sign, wait_for_previous
from tests.builders.predictions import SmallRun, small_run


@pytest.fixture
def run(tmp_path: Path) -> SmallRun:
    return small_run(tmp_path / "predictions", 3)


@pytest.fixture
def other_process() -> Any:
    """A process of this machine that does nothing."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def driver_of(pid: int, **changes: Any) -> Driver:
    """A driver in another process of this machine."""
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return replace(identify_driver(), **{"pid": pid, "started": started, **changes})


def announced_by(run: SmallRun, driver: Driver, ago_s: float = 0) -> Ledger:
    """A ledger as a newcomer reads it after this driver announced itself so many seconds ago."""
    first = run.ledger()
    first.driver = driver
    first.announce()
    path = "ledger/000000.json"
    entry = json.loads(run.state.read(path))
    entry.pop("sha256")
    entry["at"] = (datetime.now(UTC) - timedelta(seconds=ago_s)).isoformat(timespec="seconds")
    run.state.put(path, encode(entry)[0])
    return run.ledger()


def give_sign(run: SmallRun, driver: Driver, ago_s: float = 0, *, left: bool = False) -> None:
    at = (datetime.now(UTC) - timedelta(seconds=ago_s)).isoformat(timespec="milliseconds")
    run.state.put(DRIVER_JSON, json.dumps({"id": driver.id, "at": at, "left": left}).encode())


class Clock:
    """Sleeps at once, notes for how long, and lets something happen after so many naps."""

    def __init__(self, after: int = 0, happens: Callable[[], object] = lambda: None) -> None:
        self.slept_s = 0.0
        self._naps, self._after, self._happens = 0, after, happens

    def __call__(self, seconds: float) -> None:
        self.slept_s += seconds
        self._naps += 1
        if self._naps == self._after:
            self._happens()


def test_this_process_and_others_are_told_alive_from_dead(other_process: Any) -> None:
    alive = driver_of(other_process.pid)
    assert is_running(alive) is True
    assert is_running(replace(alive, started="1")) is False, "the process id was given again"
    assert is_running(identify_driver()) is False, "an earlier run in this process has ended"
    assert is_running(replace(alive, host="elsewhere")) is None
    assert is_running(replace(alive, namespace="another container")) is None
    other_process.kill()
    other_process.wait()
    assert is_running(alive) is False


def test_a_killed_process_that_nobody_has_waited_for_is_dead(other_process: Any) -> None:
    alive = driver_of(other_process.pid)
    other_process.kill()
    while Path(f"/proc/{other_process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        pass
    assert is_running(alive) is False


def test_a_second_driver_on_one_machine_refuses_at_once_and_says_who_is_at_work(
    run: SmallRun, other_process: Any
) -> None:
    first = driver_of(other_process.pid)
    clock = Clock()
    with pytest.raises(LedgerLost, match=rf"another driver \(.*pid {first.pid}\).*--take-over"):
        wait_for_previous(announced_by(run, first, ago_s=9999), run.state, sleep=clock)
    assert clock.slept_s == 0
    assert run.ledger().state.entries == 1, "the first driver's next entry is free"


def test_take_over_replaces_a_running_driver_and_says_whom(
    run: SmallRun, other_process: Any, caplog: pytest.LogCaptureFixture
) -> None:
    wait_for_previous(announced_by(run, driver_of(other_process.pid)), run.state, take_over=True)
    assert f"pid {other_process.pid}" in caplog.text


def test_a_dead_process_is_taken_over_at_once(
    run: SmallRun, other_process: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ledger = announced_by(run, driver_of(other_process.pid))
    other_process.kill()
    other_process.wait()
    clock = Clock()
    wait_for_previous(ledger, run.state, sleep=clock)
    assert clock.slept_s == 0
    assert f"pid {other_process.pid}, which has ended" in caplog.text


ELSEWHERE = Driver("a" * 32, "elsewhere", 7, lease_s=60)


def test_a_silent_driver_on_another_machine_is_replaced_after_its_lease(
    run: SmallRun, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    wait_for_previous(announced_by(run, ELSEWHERE, ago_s=20), run.state, sleep=clock)
    assert 35 < clock.slept_s <= 40
    assert "elsewhere, pid 7" in caplog.text


def test_a_driver_whose_lease_is_over_is_replaced_at_once(run: SmallRun) -> None:
    clock = Clock()
    wait_for_previous(announced_by(run, ELSEWHERE, ago_s=61), run.state, sleep=clock)
    assert clock.slept_s == 0


def test_a_clock_that_is_ahead_costs_one_lease_at_most(run: SmallRun) -> None:
    clock = Clock()
    wait_for_previous(announced_by(run, ELSEWHERE, ago_s=-9999), run.state, sleep=clock)
    assert clock.slept_s <= 60


def test_a_sign_during_the_wait_is_a_refusal(run: SmallRun) -> None:
    ledger = announced_by(run, ELSEWHERE, ago_s=20)
    give_sign(run, ELSEWHERE, ago_s=10)
    clock = Clock(after=3, happens=lambda: give_sign(run, ELSEWHERE))
    with pytest.raises(LedgerLost, match="elsewhere, pid 7"):
        wait_for_previous(ledger, run.state, sleep=clock)
    assert clock.slept_s == 3


def test_an_entry_during_the_wait_is_a_refusal(run: SmallRun) -> None:
    ledger = announced_by(run, ELSEWHERE)
    third = run.ledger()
    with pytest.raises(LedgerLost, match="another driver"):
        wait_for_previous(ledger, run.state, sleep=Clock(after=2, happens=third.announce))


@pytest.mark.parametrize("after", [0, 2])
def test_a_driver_that_said_it_leaves_is_not_waited_for(run: SmallRun, after: int) -> None:
    ledger = announced_by(run, ELSEWHERE)
    clock = Clock(after, lambda: give_sign(run, ELSEWHERE, left=True))
    if not after:
        give_sign(run, ELSEWHERE, left=True)
    wait_for_previous(ledger, run.state, sleep=clock)
    assert clock.slept_s == after


def test_a_sign_of_a_driver_that_was_replaced_is_ignored(run: SmallRun) -> None:
    ledger = announced_by(run, ELSEWHERE, ago_s=61)
    give_sign(run, replace(ELSEWHERE, id="b" * 32))
    clock = Clock()
    wait_for_previous(ledger, run.state, sleep=clock)
    assert clock.slept_s == 0


def test_a_holder_gives_signs_within_its_lease_and_one_when_it_leaves(run: SmallRun) -> None:
    ledger = Ledger.open(run.state, run.identity, n_items=3, lease_s=0.03)
    with hold_run(ledger, run.state):
        assert not run.state.exists(DRIVER_JSON), "nothing is signed before the driver announced itself"
        ledger.announce()
        seen = set()
        while len(seen) < 3:
            if run.state.exists(DRIVER_JSON):
                seen.add(run.state.read(DRIVER_JSON))
        assert not read_sign(ledger, run.state).left
    assert read_sign(ledger, run.state).left


def test_a_holder_that_fails_says_that_it_leaves_and_one_that_publishes_leaves_nothing(run: SmallRun) -> None:
    ledger = run.ledger()
    with pytest.raises(RuntimeError), hold_run(ledger, run.state):
        ledger.announce()
        raise RuntimeError
    assert read_sign(ledger, run.state).left
    second = run.ledger()
    with hold_run(second, run.state):
        second.announce()
        second.record([run.write(range(3))])
        run.publish(second)
    assert not run.state.exists(DRIVER_JSON)


def test_a_published_run_is_nobodys_and_a_repeat_writes_nothing(run: SmallRun) -> None:
    ledger = announced_by(run, ELSEWHERE)
    ledger.record([run.write(range(3))])
    run.publish(ledger)
    before = run.state.list()
    with hold_run(run.ledger(), run.state):
        pass
    assert run.state.list() == before


def test_a_state_folder_that_takes_no_sign_does_not_end_the_run(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = run.ledger()

    def fail(*_: object) -> None:
        raise OSError("out of order")

    with hold_run(ledger, run.state):
        ledger.announce()
        monkeypatch.setattr(type(run.state), "put", fail)
    assert "driver.json could not be written: out of order" in caplog.text


def test_the_driver_in_an_entry_says_its_lease(run: SmallRun) -> None:
    ledger = Ledger.open(run.state, run.identity, n_items=3, lease_s=5)
    ledger.announce()
    assert Driver(**run.ledger().state.driver) == ledger.driver
    assert asdict(ledger.driver)["lease_s"] == 5
