"""Runs two drivers one storage operation at a time, in every order that can make a difference.

Each driver is a thread that stops before every operation on the shared folders and waits for its turn. A
state is what each file was last written by, and what each driver has seen so far; from equal states
equal things follow, so each is continued once. Schedules are replayed from a fresh folder, so a driver's
fresh names are numbered instead of drawn.
"""

import threading
import uuid
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.builders.hooked_storage import Hook

WRITES = ("put", "put_file_over", "create")
NAMES = "AB"


class Numbers(threading.local):
    """How many fresh names this thread has had."""

    drawn = 0


def numbered_uuids() -> Callable[[], uuid.UUID]:
    """In place of `uuid.uuid4`: each driver's names in the order it asks for them."""
    numbers = Numbers()

    def draw() -> uuid.UUID:
        numbers.drawn += 1
        return uuid.UUID(int=(ord(threading.current_thread().name[0]) << 64) + numbers.drawn)

    return draw


class Abandoned(BaseException):
    """This schedule leads to a state that was continued before."""


@dataclass
class Driver:
    """One thread under the scheduler's hand."""

    name: str
    history: list[Hashable] = field(default_factory=list)
    outcome: str | None = None
    abandoned: bool = False
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    paused: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def start(self, work: Callable[[Hook], None], world: "World") -> threading.Thread:
        def body() -> None:
            self.turn.acquire()
            try:
                if not self.abandoned:
                    work(lambda operation, args, proceed: world.operate(self, operation, args, proceed))
                self.outcome = "finished"
            except Abandoned:
                self.outcome = "abandoned"
            except Exception as error:
                self.outcome = type(error).__name__
            self.paused.release()

        thread = threading.Thread(target=body, name=self.name, daemon=True)
        thread.start()
        return thread

    def step(self) -> None:
        """Let it do its next operation and come to rest before the one after."""
        self.turn.release()
        self.paused.acquire()


@dataclass
class World:
    """The shared folders: who wrote what last."""

    private: Callable[[str, str], bool]
    """Operations that no other driver can notice, nor change the outcome of."""
    versions: dict[str, Hashable] = field(default_factory=dict)

    def operate(
        self, driver: Driver, operation: str, args: tuple[Any, ...], proceed: Callable[[], Any]
    ) -> Any:
        path = str(args[0]) if args else ""
        if self.private(operation, path):
            return self.quietly(driver, operation, path, proceed)
        driver.paused.release()
        driver.turn.acquire()
        if driver.abandoned:
            raise Abandoned
        try:
            result = proceed()
        except Exception as error:
            driver.history.append((operation, path, type(error).__name__))
            raise
        driver.history.append((operation, path, self.seen(operation, path, result)))
        if operation in WRITES:
            self.versions[path] = (driver.name, len(driver.history))
        elif operation == "delete":
            for deleted in args:
                self.versions.pop(str(deleted), None)
        return result

    def quietly(self, driver: Driver, operation: str, path: str, proceed: Callable[[], Any]) -> Any:
        """An operation that belongs to the turn before it."""
        result = proceed()
        if operation in WRITES:
            driver.history.append((operation, "quietly"))
            self.versions[path] = (driver.name, len(driver.history))
        return result

    def seen(self, operation: str, path: str, result: Any) -> Hashable:
        if operation == "list":
            return tuple(sorted((entry.path, self.versions.get(entry.path)) for entry in result))
        if operation in ("read", "open_input", "version"):
            return self.versions.get(path)
        return result if isinstance(result, bool | int) else None

    def state(self, drivers: Sequence[Driver]) -> Hashable:
        files = frozenset(self.versions.items())
        return files, tuple((tuple(driver.history), driver.outcome) for driver in drivers)


@dataclass
class Explored:
    """What was found: distinct states, schedules run to their end, and how drivers ended."""

    states: set[Hashable] = field(default_factory=set)
    schedules: int = 0
    outcomes: dict[tuple[str, str], int] = field(default_factory=dict)


def explore(
    new_world: Callable[[], tuple[World, Callable[[Hook], None], Callable[[tuple[str, str]], None]]],
) -> Explored:
    """Every order of two drivers' operations.

    Args:
        new_world: makes a fresh folder; gives its world, the driver's work, and the check of its end.
    """
    explored = Explored()
    waiting: list[str] = [""]
    while waiting:
        prefix = waiting.pop()
        run_schedule(prefix, explored, waiting, *new_world())
    return explored


def run_schedule(
    prefix: str,
    explored: Explored,
    waiting: list[str],
    world: World,
    work: Callable[[Hook], None],
    check: Callable[[tuple[str, str]], None],
) -> None:
    drivers = [Driver(name) for name in NAMES]
    threads = [driver.start(work, world) for driver in drivers]
    for driver in drivers:
        driver.step()  # to rest before its first operation
    done = ""
    while running := [driver for driver in drivers if driver.outcome is None]:
        if len(done) < len(prefix):
            chosen = drivers[NAMES.index(prefix[len(done)])]
        else:
            state = world.state(drivers)
            if state in explored.states:
                break
            explored.states.add(state)
            chosen = running[0]
            waiting.extend(done + driver.name for driver in running[1:])
        chosen.step()
        done += chosen.name
    else:
        outcome = (str(drivers[0].outcome), str(drivers[1].outcome))
        explored.schedules += 1
        explored.outcomes[outcome] = explored.outcomes.get(outcome, 0) + 1
        check(outcome)
        return
    for driver in drivers:
        driver.abandoned = True
        while driver.outcome is None:
            driver.step()
    for thread in threads:
        thread.join()
