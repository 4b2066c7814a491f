"""Every point at which a driver can die, and every way in which two can get in each other's way. No Ray.

A driver here does what classify's does, with the real ledger, committer and publisher: it takes over, has
parts written that overlap (as when Ray runs a task again), records, publishes. Whatever is done to it, the
next one must end with the same rows, and `verify` must agree.
"""

import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow.dataset as ds
import pytest

from pipelines.ledger.entries import LedgerDamaged, Phase
from pipelines.ledger.item_set import ids_of
from pipelines.ledger.layout import GENERATIONS, PLAIN, TableLayout
from pipelines.ledger.ledger import Ledger, LedgerLost
from pipelines.ledger.parts import Committer
from pipelines.ledger.publish import find_failed_items, publish
from pipelines.ledger.verify import verify
from pipelines.storage.storage import Storage
from tests.builders.hooked_storage import BlindBucket, Bucket, Hook, HookedStorage, Unfenced
from tests.builders.interleaving import World, explore, numbered_uuids
from tests.builders.predictions import SmallRun, small_run

N_ITEMS = 6
LINES_APART = int(os.environ.get("IAB_VISION_TEST_LINES_APART", "17"))
"""Signals come at every so-manieth line that runs; 1 tries them all, in several minutes."""
PAIRS_APART = int(os.environ.get("IAB_VISION_TEST_PAIRS_APART", "3"))
"""A second crash is tried after every so-manieth first one; 1 tries them all."""
WRITES = ("put", "put_file_over", "create", "delete")


class Crash(BaseException):
    """The process is gone."""


def drive(run: SmallRun, state: Storage, table: Storage) -> None:
    """One driver from start to end, or until something stops it."""
    ledger = run.ledger(state)
    if ledger.state.phase is not Phase.PUBLISHED:
        ledger.announce()
    if ledger.state.phase is Phase.RUNNING:
        committer = Committer(ledger, state, every_s=0)
        try:
            classify(run, ledger, committer, state)
        except Stop:
            committer.flush()
            raise
    publish(ledger, run.plan, state, table, rows_per_file=4)


class Stop(BaseException):
    """SIGTERM, as the driver's loop sees it: it may write the entry in hand and must then leave."""


def classify(run: SmallRun, ledger: Ledger, committer: Committer, state: Storage) -> None:
    """Parts of up to three items, each repeating the last item of the one before."""
    missing = ids_of(ledger.done.missing()).tolist()
    for start in range(0, len(missing), 2):
        committer.add(run.write(missing[max(0, start - 1) : start + 2], state=state))
    committer.flush()


def published(run: SmallRun) -> list[dict[str, Any]]:
    """The table's rows without the time of writing, which no rerun can repeat."""
    table = ds.dataset(f"{run.uri}/table", format="parquet").to_table().drop_columns(["classified_at"])
    return sorted(table.to_pylist(), key=lambda row: str(row["image_id"]))


def verified(run: SmallRun) -> bool:
    """Whether all checks pass; the report is the job's, not the ledger's."""
    return all(check.ok for check in verify(run.uri) if check.name != "report")


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Memory, where there is such a folder: thousands of runs sync their files."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path_factory.mktemp("runs")
        return
    folder = Path(tempfile.mkdtemp(prefix="iab-vision-test-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def new_run(fast: Path) -> Callable[[], SmallRun]:
    """Fresh output folders that share one plan."""
    original = small_run(fast / "original", N_ITEMS)
    made = iter(range(10**9))

    def make() -> SmallRun:
        folder = fast / f"run-{next(made)}"
        shutil.copytree(original.uri, folder)
        return SmallRun(str(folder), original.plan)

    return make


@pytest.fixture(scope="module")
def expected(new_run: Callable[[], SmallRun]) -> list[dict[str, Any]]:
    run = new_run()
    drive(run, run.state, run.table)
    assert verified(run)
    return published(run)


@dataclass
class CrashAt:
    """Lets `survives` writes happen, then dies: before the next, or half-way through it."""

    survives: int
    half: bool = False
    seen: int = 0
    fired: bool = False

    def __call__(self, operation: str, args: tuple[Any, ...], proceed: Callable[[], Any]) -> Any:
        if operation not in WRITES:
            return proceed()
        if self.fired or self.seen == self.survives:
            self.fired = True
            raise Crash
        self.seen += 1
        return proceed()


@dataclass
class Litter:
    """What a process killed half-way through a local write leaves behind."""

    folder: Path
    crash: CrashAt

    def __call__(self, operation: str, args: tuple[Any, ...], proceed: Callable[[], Any]) -> Any:
        try:
            return self.crash(operation, args, proceed)
        except Crash:
            if self.crash.half and operation == "delete":
                for path in args[: len(args) // 2]:
                    (self.folder / path).unlink()
            elif self.crash.half:
                target = self.folder / args[0]
                target.parent.mkdir(parents=True, exist_ok=True)
                payload = args[1] if isinstance(args[1], bytes) else b"PAR1"
                target.with_name(f".{target.name}.{'0' * 32}.tmp").write_bytes(payload[: len(payload) // 2])
            raise


def crashing(run: SmallRun, crash: CrashAt) -> tuple[Storage, Storage]:
    """The run's two storages, dying together."""
    folder = Path(run.uri)
    state: Any = HookedStorage(run.state, Litter(folder / "state", crash))
    table: Any = HookedStorage(run.table, Litter(folder / "table", crash))
    return state, table


def crash_once(run: SmallRun, crash: CrashAt) -> bool:
    """Drive until the crash; False when the driver came to its end first."""
    try:
        drive(run, *crashing(run, crash))
    except Crash:
        return True
    return False


@pytest.mark.parametrize("half", [False, True])
def test_a_crash_at_any_write_is_made_good_by_the_next_run(
    new_run: Callable[[], SmallRun], expected: list[dict[str, Any]], half: bool
) -> None:
    survives = 0
    while crash_once(run := new_run(), CrashAt(survives, half)):
        drive(run, run.state, run.table)
        assert published(run) == expected, survives
        assert verified(run), survives
        survives += 1
    print(f"\n{survives} crash points")
    assert survives > 15


@pytest.mark.slow
def test_a_crash_at_any_write_of_the_run_that_makes_good_a_crash_is_made_good_too(
    new_run: Callable[[], SmallRun], expected: list[dict[str, Any]]
) -> None:
    pairs = first = 0
    while True:
        second = 0
        while True:
            run = new_run()
            if not crash_once(run, CrashAt(first)):
                print(f"\n{pairs} pairs of crash points")
                assert pairs > 60
                return
            if not crash_once(run, CrashAt(second)):
                break
            drive(run, run.state, run.table)
            assert published(run) == expected, (first, second)
            assert verified(run), (first, second)
            pairs += 1
            second += 1
        first += PAIRS_APART


@pytest.fixture(scope="module")
def half_failed(new_run: Callable[[], SmallRun]) -> SmallRun:
    """A published run in which every second item failed for a passing reason."""
    run = new_run()
    ledger = run.ledger()
    for start in (0, 2, 4):
        ledger.record([run.write([start, start + 1], lambda item_id: "ok" if item_id % 2 else "timeout")])
    run.publish(ledger, rows_per_file=4)
    return run


def drive_rerun(run: SmallRun, state: Storage, table: Storage) -> None:
    """What `--retry-failed` does, from wherever an earlier attempt stopped."""
    ledger = run.ledger(state)
    if ledger.state.phase is Phase.PUBLISHED and (failed := find_failed_items(ledger, run.plan, table)):
        ledger.start_generation(failed)
    if ledger.state.phase is Phase.RUNNING:
        for start, stop in ledger.done.missing():
            ledger.record([run.write(range(start, stop), generation=2, state=state)])
    publish(ledger, run.plan, state, table, rows_per_file=4)


def test_a_crash_at_any_write_of_a_rerun_is_made_good_and_readers_see_every_row_once(
    fast: Path, half_failed: SmallRun, expected: list[dict[str, Any]]
) -> None:
    survives, crashed = 0, True
    while crashed:
        shutil.copytree(half_failed.uri, folder := fast / f"rerun-{survives}")
        run = SmallRun(str(folder), half_failed.plan)
        try:
            drive_rerun(run, *crashing(run, CrashAt(survives)))
            crashed = False
        except Crash:
            pass
        assert [row["image_id"] for row in published(run)] == [row["image_id"] for row in expected]
        drive_rerun(run, run.state, run.table)
        assert published(run) == expected, survives
        assert verified(run), survives
        survives += 1
    print(f"\n{survives} crash points")
    assert survives > 10


TRACED = ("ledger/entries.py", "ledger/ledger.py", "ledger/parts.py", "ledger/publish.py", "storage/local.py")


@dataclass
class StopAtLine:
    """Raises at the n-th line run in the traced modules, as a signal handler would."""

    line: int
    signal: type[BaseException]
    seen: int = 0
    where: str = ""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.endswith(TRACED) or "pipelines" not in frame.f_code.co_filename:
            return None
        return self.trace_line

    def trace_line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.seen += 1
            if self.seen == self.line:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise self.signal
        return self.trace_line


@pytest.mark.slow
@pytest.mark.parametrize("signal", [Crash, Stop])
def test_a_signal_between_any_two_lines_loses_and_doubles_nothing(
    new_run: Callable[[], SmallRun], expected: list[dict[str, Any]], signal: type[BaseException]
) -> None:
    line, places = (1 if signal is Crash else 2), set()
    while True:
        run, stop = new_run(), StopAtLine(line, signal)
        sys.settrace(stop)
        try:
            drive(run, run.state, run.table)
        except (Crash, Stop):
            pass
        finally:
            sys.settrace(None)
        if not stop.where:
            break
        drive(run, run.state, run.table)
        assert published(run) == expected, stop.where
        assert verified(run), stop.where
        places.add(stop.where)
        line += LINES_APART
    print(f"\n{signal.__name__}: {line // LINES_APART} moments at {len(places)} different lines")
    assert len(places) > 60


def three_parts(run: SmallRun, state: Storage, table: Storage) -> None:
    """A driver over a run of three parts of one item each."""
    ledger = run.ledger(state)
    if ledger.state.phase is not Phase.PUBLISHED:
        ledger.announce()
    if ledger.state.phase is Phase.RUNNING:
        committer = Committer(ledger, state, every_s=0)
        for item_id in ids_of(ledger.done.missing()).tolist():
            committer.add(run.write([item_id], state=state))
    publish(ledger, run.plan, state, table, rows_per_file=100)


def own_affair(operation: str, path: str) -> bool:
    """A part's fresh file; the identity, which all write alike; entries just listed, which never change."""
    if operation == "put":
        return path.startswith("parts/")
    return path in ("run.json", "spool/g0001") or (operation == "read" and path.startswith("ledger/"))


def in_one_go(operation: str, path: str) -> bool:
    """Clearing up and the marker too, which the orders of three parts have gone through step by step."""
    return own_affair(operation, path) or path.startswith(("parts/", "spool/")) or path == "_SUCCESS"


@pytest.fixture
def three(fast: Path, monkeypatch: pytest.MonkeyPatch) -> SmallRun:
    monkeypatch.setattr(uuid, "uuid4", numbered_uuids())
    shutil.rmtree(fast / "three", ignore_errors=True)
    return small_run(fast / "three", 3)


Drive = Callable[[SmallRun, Storage, Storage], None]


def contest(
    begun: SmallRun,
    fast: Path,
    wrapped: type[HookedStorage],
    drive: Drive = three_parts,
    private: Callable[[str, str], bool] = own_affair,
) -> Callable[[], tuple[World, Callable[[Hook], None], Callable[[tuple[str, str]], None]]]:
    """Fresh folders for two drivers, and the check that a third finds or makes the table whole."""
    whole: list[list[dict[str, Any]]] = []

    def new_world() -> tuple[World, Callable[[Hook], None], Callable[[tuple[str, str]], None]]:
        folder = Path(tempfile.mkdtemp(dir=fast)) / "run"
        shutil.copytree(begun.uri, folder)
        run = SmallRun(str(folder), begun.plan)

        def work(hook: Hook) -> None:
            state: Any = wrapped(run.state, hook)
            table: Any = wrapped(run.table, hook)
            drive(run, state, table)

        def check(outcome: tuple[str, str]) -> None:
            assert set(outcome) <= {"finished", "LedgerLost"}, outcome
            assert "finished" in outcome
            assert verified(run), [c for c in verify(run.uri) if not c.ok]
            drive(run, run.state, run.table)
            whole.append(published(run))
            assert whole[-1] == whole[0]
            shutil.rmtree(folder.parent)

        return World(private=private), work, check

    return new_world


@pytest.mark.slow
def test_two_drivers_end_with_the_same_table_in_every_order(three: SmallRun, fast: Path) -> None:
    explored = explore(contest(three, fast, HookedStorage))
    print(f"\n{len(explored.states)} states, {explored.schedules} schedules, {explored.outcomes}")
    assert explored.schedules > 10


def test_without_the_conditional_put_two_drivers_do_damage(three: SmallRun, fast: Path) -> None:
    with pytest.raises((AssertionError, LedgerDamaged, LedgerLost, FileNotFoundError)):
        explore(contest(three, fast, Unfenced))


@pytest.fixture
def unpublished(fast: Path, monkeypatch: pytest.MonkeyPatch) -> SmallRun:
    """A run of one image that failed in passing, recorded and closed: next its table file, then its rerun."""
    monkeypatch.setattr(uuid, "uuid4", numbered_uuids())
    shutil.rmtree(fast / "unpublished", ignore_errors=True)
    run = small_run(fast / "unpublished", 1)
    ledger = run.ledger()
    ledger.record([run.write([0], lambda item_id: "timeout")])
    ledger.close(rows_per_file=100)
    return run


def publish_and_rerun(run: SmallRun, state: Storage, table: Storage, layout: TableLayout = PLAIN) -> None:
    """A driver that publishes what is recorded, or takes a rerun of it to its end."""
    ledger = run.ledger(state)
    if ledger.state.phase is not Phase.PUBLISHED:
        ledger.announce()
    publish_next(run, ledger, state, table, layout)
    if failed := find_failed_items(ledger, run.plan, table):
        ledger.start_generation(failed)
        publish_next(run, ledger, state, table, layout)


def publish_next(run: SmallRun, ledger: Ledger, state: Storage, table: Storage, layout: TableLayout) -> None:
    if ledger.state.phase is Phase.RUNNING and not ledger.done.full:
        ledger.record([run.write([0], generation=ledger.state.generation, state=state)])
    publish(ledger, run.plan, state, table, rows_per_file=100, layout=layout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrapped", "layout"), [(HookedStorage, PLAIN), (Bucket, PLAIN), (HookedStorage, GENERATIONS)]
)
def test_two_drivers_that_publish_and_rerun_end_with_the_same_table_in_every_order(
    unpublished: SmallRun, fast: Path, wrapped: type[HookedStorage], layout: TableLayout
) -> None:
    drive = partial(publish_and_rerun, layout=layout)
    explored = explore(contest(unpublished, fast, wrapped, drive, in_one_go))
    print(f"\n{len(explored.states)} states, {explored.schedules} schedules, {explored.outcomes}")
    assert explored.schedules > 10


@pytest.mark.slow
def test_without_a_condition_a_publisher_that_was_paused_writes_over_the_rerun(
    unpublished: SmallRun, fast: Path
) -> None:
    with pytest.raises(AssertionError):
        explore(contest(unpublished, fast, BlindBucket, publish_and_rerun, in_one_go))
