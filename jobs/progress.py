"""Progress of a long job: a live bar on a terminal, a line every half minute in a job's log."""

import logging
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 30.0

log = logging.getLogger(__name__)


class ProgressReport:
    """Shows rows done of a known total, images/s, time left and errors."""

    def __init__(self, total: int, done: int = 0, *, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._total, self._first, self._errors = total, done, 0
        self._started = self._spoke = time.monotonic()
        columns = (TextColumn("classifying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=self._console)
        self._task = self._bar.add_task("", total=total, completed=done, note="")

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, done: int, errors: int) -> None:
        """Say how many rows are written in all, and how many of them carry no label."""
        rate = (done - self._first) / max(time.monotonic() - self._started, 1e-9)
        note = f"{rate:,.0f} images/s, {errors:,} without label"
        self._bar.update(self._task, completed=done, note=note)
        if not self._console.is_terminal and time.monotonic() - self._spoke >= LINE_EVERY_S:
            self._spoke = time.monotonic()
            left = (self._total - done) / rate if rate else float("inf")
            log.info("%s of %s rows, %s, about %.0f s left", f"{done:,}", f"{self._total:,}", note, left)
