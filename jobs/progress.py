"""Progress of a long job: a live bar on a terminal, a line every half minute in a job's log."""

import logging
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 30.0

log = logging.getLogger(__name__)


class ProgressReport:
    """Shows images done of a known total, images/s, time left, rows without label, images put off."""

    def __init__(self, total: int, done: int = 0, *, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._total, self._first, self._done = total, done, done
        self._errors = self._deferred = 0
        self._started = self._spoke = time.monotonic()
        columns = (TextColumn("classifying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=self._console)
        self._task = self._bar.add_task("", total=total, completed=done, note="")

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, images: int, errors: int) -> None:
        """So many more images are written, among their rows so many without a label."""
        self._done += images
        self._errors += errors

    def defer(self, images: int) -> None:
        """So many images were put off to a later pass."""
        self._deferred += images

    def show(self) -> None:
        """Update the bar, or write a line when it is time for one."""
        rate = (self._done - self._first) / max(time.monotonic() - self._started, 1e-9)
        note = f"{rate:,.0f} images/s, {self._errors:,} rows without label, {self._deferred:,} put off"
        self._bar.update(self._task, completed=self._done, note=note)
        if not self._console.is_terminal and time.monotonic() - self._spoke >= LINE_EVERY_S:
            self._spoke = time.monotonic()
            left = f"about {(self._total - self._done) / rate:,.0f} s left" if rate else "time left unknown"
            log.info("%s of %s images, %s, %s", f"{self._done:,}", f"{self._total:,}", note, left)
