"""Progress of a long job: a live bar on a terminal, a line at intervals in a log."""

import logging
import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipelines import metrics

LINE_EVERY_S = 15.0
NARROW = 100
"""Columns of a terminal below which the figures alone are shown, so that they fit."""

log = logging.getLogger(__name__)


class LiveProgress:
    """A bar with a note on a terminal; else a line when a stage begins, and every `LINE_EVERY_S`."""

    def __init__(self, title: str, unit: str, *, total: int | None, console: Console | None = None) -> None:
        self._title, self._unit = title, unit
        self._console = console or Console(stderr=True)
        self._first: tuple[int, float] | None = None
        self._stage, self._logged_at = 0, time.monotonic()
        self._bar = Progress(*self._columns(), console=self._console)
        self._task = self._bar.add_task("", total=total, note="starting")

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        else:
            log.info("%s: starting", self._title)
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:  # else it would print an empty line
            self._bar.stop()

    def update(self, done: int, total: int, note: str, *, stage: int = 0) -> None:
        """Show so many done of all; a new `stage` gets a line of its own in a log."""
        now = time.monotonic()
        self._first = self._first or (done, now)
        self._bar.update(self._task, completed=done, total=total, note=note)
        due = stage != self._stage or now - self._logged_at >= LINE_EVERY_S
        if due and not self._console.is_terminal:
            self._stage, self._logged_at = stage, now
            rate = (done - self._first[0]) / max(now - self._first[1], 1e-9)
            left = f", about {(total - done) / rate:,.0f} s left" if rate and done < total else ""
            log.info("%s of %s %s, %s%s", f"{done:,}", f"{total:,}", self._unit, note, left)

    def _columns(self) -> tuple[Any, ...]:
        figures = (MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        return figures if self._console.width < NARROW else (TextColumn(self._title), BarColumn(), *figures)


class ClassifyProgress(LiveProgress):
    """Images classified of a known total, images/s, rows without a label, images waiting for a retry."""

    def __init__(self, total: int, done: int = 0, *, console: Console | None = None) -> None:
        super().__init__("classifying", "images", total=total, console=console)
        self._total, self._done, self._before = total, done, done
        self._errors = self._waiting = 0
        self._started = time.monotonic()

    def advance(self, images: int, errors: int) -> None:
        """So many more images are written, among their rows so many without a label."""
        self._done += images
        self._errors += errors

    def defer(self, images: int) -> None:
        """So many images wait for a later pass."""
        self._waiting += images

    def show(self) -> None:
        """Update the bar, or write a line when it is time for one; the same figures go to Prometheus."""
        metrics.put("run_images", self._total)
        metrics.put("run_images_carried", self._before)
        metrics.put("run_images_recorded", self._done)
        metrics.put("run_images_deferred", self._waiting)
        rate = (self._done - self._before) / max(time.monotonic() - self._started, 1e-9)
        note = f"{rate:,.0f} images/s, {self._errors:,} rows without label"
        left = min(self._waiting, self._total - self._done)  # one that fails again was counted before
        waiting = f", {left:,} for retry" if left else ""
        self.update(self._done, self._total, note + waiting)


class TrainingProgress(LiveProgress):
    """Steps of a training run, with its epoch, loss, validation metric and images/s."""

    def __init__(self, metric: str, *, console: Console | None = None) -> None:
        super().__init__("training", "steps", total=None, console=console)
        self._metric = metric

    def __call__(self, message: dict[str, Any]) -> None:
        epoch = message["epoch"] + 1
        loss = f", loss {message['loss']:.3f}" if message["loss"] is not None else ""
        metric = f", {self._metric} {message['metric']:.4f}" if message["metric"] is not None else ""
        note = f"epoch {epoch}{loss}{metric}, {message['images_per_s']:,.0f} images/s"
        self.update(message["done"], message["total"], note, stage=epoch)
