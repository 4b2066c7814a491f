"""Progress of a training run: a live bar on a terminal, in a log a line per epoch and every half minute."""

import logging
import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 30.0

log = logging.getLogger(__name__)


class TrainingProgress:
    """Shows loss, validation metric, images/s and time left: a bar on a terminal, else a line at times."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.console = Console(stderr=True)
        columns = (TextColumn("training"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console)
        self.task = self.bar.add_task("", total=None, note="decoding")
        self.first: tuple[int, float] | None = None
        self.epoch, self.spoke = -1, 0.0

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, message: dict[str, Any]) -> None:
        done, total, now = message["done"], message["total"], time.monotonic()
        self.first = self.first or (done, now)
        metric = f", {self.metric} {message['metric']:.4f}" if message["metric"] is not None else ""
        loss = f"loss {message['loss']:.3f}" if message["loss"] is not None else ""
        note = f"epoch {message['epoch'] + 1}, {loss}{metric}, {message['images_per_s']:,.0f} images/s"
        self.bar.update(self.task, completed=done, total=total, note=note)
        if not self.console.is_terminal and (
            message["epoch"] != self.epoch or now - self.spoke >= LINE_EVERY_S
        ):
            self.epoch, self.spoke = message["epoch"], now
            rate = (done - self.first[0]) / max(now - self.first[1], 1e-9)
            left = f", about {(total - done) / rate:.0f} s left" if rate else ""
            log.info("%s of %s steps, %s%s", f"{done:,}", f"{total:,}", note, left)
