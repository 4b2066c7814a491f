"""Progress on a terminal and in a log."""

import io
import logging

import pytest
from rich.console import Console

from jobs import progress
from jobs.progress import ClassifyProgress, TrainingProgress

STEP = {"done": 30, "total": 425, "epoch": 1, "loss": 1.25, "metric": 0.5, "images_per_s": 1234.0}


@pytest.mark.parametrize("width", [80, 180])
def test_a_terminal_shows_every_figure_at_any_width(width: int) -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=width, force_terminal=True, color_system=None)
    with ClassifyProgress(12_180, 100, console=console) as classifying:
        classifying.advance(1_436, 12)
        classifying.defer(3)
        classifying.show()
    assert "1536/12180" in shown.getvalue()
    assert "12 rows without label, 3 for retry" in shown.getvalue()
    shown.truncate(0)
    with TrainingProgress("accuracy", console=console) as training:
        training(STEP)
    assert "epoch 2, loss 1.250, accuracy 0.5000, 1,234 images/s" in shown.getvalue()


def test_a_log_gets_a_line_at_the_start_per_epoch_and_at_intervals(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    console = Console(file=io.StringIO())
    with TrainingProgress("accuracy", console=console) as training:
        training(STEP)
        training(STEP)
        training({**STEP, "epoch": 2})
    assert [line.split(",")[0] for line in caplog.messages] == [
        "training: starting", "30 of 425 steps", "30 of 425 steps",
    ]  # fmt: skip
    caplog.clear()
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0)
    with ClassifyProgress(100, console=console) as classifying:
        classifying.advance(10, 1)
        classifying.show()
    assert caplog.messages[1].startswith("10 of 100 images, ")
    assert console.file.getvalue() == ""
