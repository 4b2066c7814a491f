"""Runs two drivers one storage operation at a time, in every order of few switches between them.

Faults of concurrent programs show after one or two switches (Musuvathi and Qadeer, Iterative Context
Bounding, 2007). Each driver is a thread that stops before every operation on the shared folders and waits
for its turn. A state is what each file was last written by, and what each driver has seen so far; from equal
states equal things follow, so each is continued once. Schedules are replayed from a fresh folder, so a
driver's fresh names are numbered instead of drawn.
"""

import os
import threading
import uuid
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tests.builders.hooked_storage import Hook

WRITES = ("put", "put_file_over", "create")
NAMES = "AB"
SWITCHES = int(os.environ.get("IAB_VISION_TEST_SWITCHES", "2"))
"""How often the turn goes from one driver to the other before it ends; 99 tries all, in several minutes."""


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


def held() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


@dataclass
class Driver:
    """One thread, which runs only while it has its turn."""

    name: str
    history: list[Hashable] = field(default_factory=list)
    outcome: str | None = None
    abandoned: bool = False
    turn: threading.Lock = field(default_factory=held)

    def start(self, work: Callable[[Hook], None], schedule: "Schedule") -> threading.Thread:
        def body() -> None:
            self.turn.acquire()
            try:
                if not self.abandoned:
                    work(lambda operation, args, proceed: schedule.operate(self, operation, args, proceed))
                self.outcome = "finished"
            except Abandoned:
                self.outcome = "abandoned"
            except Exception as error:
                self.outcome = type(error).__name__
            schedule.rest(self)

        thread = threading.Thread(target=body, name=self.name, daemon=True)
        thread.start()
        return thread


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
    """Every order of two drivers' operations that changes at most SWITCHES times from one to the other.

    Args:
        new_world: makes a fresh folder; gives its world, the driver's work, and the check of its end.
    """
    explored = Explored()
    by_switches: list[list[str]] = [[*NAMES], *([] for _ in range(SWITCHES))]
    for waiting in by_switches:  # fewest first: from a state that is met again no more can follow than before
        while waiting:
            world, work, check = new_world()
            schedule = Schedule(waiting.pop(), explored, world)
            outcome = schedule.run(work)
            for order in schedule.others:
                if (switches := switched(order)) <= SWITCHES:
                    by_switches[switches].append(order)
            if outcome:
                explored.schedules += 1
                explored.outcomes[outcome] = explored.outcomes.get(outcome, 0) + 1
                check(outcome)
    return explored


def switched(order: str) -> int:
    return sum(one != other for one, other in pairwise(order))


@dataclass
class Schedule:
    """One order of operations; the driver that comes to rest chooses who goes on, if it can itself."""

    prefix: str
    explored: Explored
    world: World
    others: list[str] = field(default_factory=list)
    """Orders that begin like this one and then give the turn to the other driver."""
    drivers: list[Driver] = field(default_factory=lambda: [Driver(name) for name in NAMES])
    over: threading.Lock = field(default_factory=held)
    done: str = ""
    n_at_rest: int = 0
    """How often a driver has come to rest, at first each before its first operation."""

    def run(self, work: Callable[[Hook], None]) -> tuple[str, str] | None:
        """How both ended; None when a state was met from which another schedule goes on."""
        threads = [driver.start(work, self) for driver in self.drivers]
        self.drivers[0].turn.release()
        self.over.acquire()
        complete = all(driver.outcome for driver in self.drivers)
        for driver in self.drivers:
            driver.abandoned = True
            if driver.outcome is None:
                driver.turn.release()
                self.over.acquire()
        for thread in threads:
            thread.join()
        return (str(self.drivers[0].outcome), str(self.drivers[1].outcome)) if complete else None

    def operate(
        self, driver: Driver, operation: str, args: tuple[Any, ...], proceed: Callable[[], Any]
    ) -> Any:
        path = str(args[0]) if args else ""
        if self.world.private(operation, path):
            return self.world.quietly(driver, operation, path, proceed)
        self.rest(driver)
        return self.world.operate(driver, operation, args, proceed)

    def rest(self, driver: Driver) -> None:
        """The driver is about to do its next operation, or has ended."""
        if driver.abandoned and driver.outcome is None:  # on its way out
            raise Abandoned
        following = None if driver.abandoned else self.follow(driver)
        if following is driver:
            return
        (following.turn if following else self.over).release()
        if driver.outcome is None:
            driver.turn.acquire()
            if driver.abandoned:
                raise Abandoned

    def follow(self, rested: Driver) -> Driver | None:
        """Who goes on; nobody when all have ended, or when the state is known."""
        self.n_at_rest += 1
        if self.n_at_rest < len(self.drivers):
            return self.drivers[self.n_at_rest]
        running = [driver for driver in self.drivers if driver.outcome is None]
        if not running:
            return None
        if len(self.done) < len(self.prefix):
            chosen = self.drivers[NAMES.index(self.prefix[len(self.done)])]
        else:
            state = self.world.state(self.drivers), rested.name
            if state in self.explored.states:
                return None
            self.explored.states.add(state)
            chosen = rested if rested in running else running[0]
            self.others.extend(self.done + other.name for other in running if other is not chosen)
        self.done += chosen.name
        return chosen
