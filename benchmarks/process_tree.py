"""CPU time and memory of a process and all its descendants, by what they do; what both sides of a comparison
are measured with."""

import threading
import time
from collections import defaultdict
from types import TracebackType
from typing import Self

import psutil

EVERY_S, EVERY_S_BEFORE = 1.0, 0.2
"""A look at 25 processes takes some 10 ms: rare once there is something to measure, often until then."""

ROLES = {
    "raylet/raylet": "raylet",
    "Classifier": "infer actors",
    "Loader": "load actors",
    "write_batch": "writing tasks",
    "ray::": "idle workers",
    "default_worker.py": "starting workers",
    "decoder_worker": "decoders",
    "gcs_server": "gcs",
}
"""Words in a command line and what the process is, the first that fits; Ray's workers rename themselves."""


class ProcessTree:
    """Owns a thread that looks at a process tree every second until the block ends."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._roles: dict[int, str] = {}
        self._looks: list[tuple[float, dict[int, float]]] = []
        self._cpu_s: dict[int, float] = {}
        self.loading_since = 0.0
        """When a load actor was first seen at work (`time.time`); 0 if none was."""
        self.peak_bytes: dict[str, int] = defaultdict(int)
        """Largest resident memory of one process of each role."""
        self.peak_private_bytes: dict[str, int] = defaultdict(int)
        """The same without pages shared with others (Ray's object store)."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def cpu_s(self, start: float = 0.0, stop: float = float("inf")) -> dict[str, float]:
        """Seconds of user and system time by role, between the last look before either time (`time.time`)."""
        earlier, later = self._look_at(start), self._look_at(stop)
        by_role: dict[str, float] = defaultdict(float)
        for pid, seconds in later.items():
            by_role[self._roles[pid]] += seconds - earlier.get(pid, 0.0)
        return dict(by_role)

    def _look_at(self, at: float) -> dict[int, float]:
        return next((cpu_s for time_s, cpu_s in reversed(self._looks) if time_s <= at), {})

    def _watch(self) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            self.look()
            every_s = EVERY_S if self.loading_since else EVERY_S_BEFORE
            self._stop.wait(max(0.0, every_s - (time.monotonic() - started)))

    def look(self) -> None:
        """Take note of every process that is there now; what has ended keeps its last figure."""
        try:
            found = [self._root, *self._root.children(recursive=True)]
        except psutil.Error:
            return
        for process in found:
            try:
                self._note(process)
            except psutil.Error:
                continue
        self._looks.append((time.time(), dict(self._cpu_s)))

    def _note(self, process: psutil.Process) -> None:
        with process.oneshot():
            words, times, memory = " ".join(process.cmdline()), process.cpu_times(), process.memory_info()
        role = self._role(process, words)
        if role == "load actors" and "__init__" not in words and not self.loading_since:
            self.loading_since = time.time()
        self._cpu_s[process.pid] = times.user + times.system
        self.peak_bytes[role] = max(self.peak_bytes[role], memory.rss)
        private = memory.rss - memory.shared
        self.peak_private_bytes[role] = max(self.peak_private_bytes[role], private)

    def _role(self, process: psutil.Process, words: str) -> str:
        """By its name now; an actor between two calls is not idle, and a task's worker runs further tasks."""
        known = self._roles.get(process.pid)
        if process == self._root:
            role = "driver"
        else:
            role = next((role for word, role in ROLES.items() if word in words), "rest")
        if known in {"infer actors", "load actors", "writing tasks"}:
            role = known
        self._roles[process.pid] = role
        return role
