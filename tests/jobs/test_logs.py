"""Log lines for collectors and on a terminal."""

import io
import json
import logging

import pytest
from rich.console import Console

from jobs.logs import RUN, JsonLines, StandardError
from jobs.progress import ClassifyProgress


def test_a_line_is_written_above_the_bar_of_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with ClassifyProgress(10, console=console):
        StandardError().emit(logging.makeLogRecord({"msg": "a line of our own"}))
    assert "\na line of our own\n" in "\n" + console.file.getvalue().replace("\x1b[2K", "\n")


def test_a_json_line_names_the_command_and_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN, "iab-vision-classify-12")
    record = logging.LogRecord("jobs.x", logging.WARNING, "x.py", 1, "%d images\nare late", (3,), None)
    text = JsonLines("classify").format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert (line["message"], line["level"], line["logger"]) == ("3 images\nare late", "WARNING", "jobs.x")
    assert (line["command"], line["run"]) == ("classify", "iab-vision-classify-12")
