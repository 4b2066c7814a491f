"""Log lines for collectors."""

import json
import logging

import pytest

from jobs.logs import RUN, JsonLines


def test_a_json_line_names_the_command_and_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN, "iab-vision-classify-12")
    record = logging.LogRecord("jobs.x", logging.WARNING, "x.py", 1, "%d images\nare late", (3,), None)
    text = JsonLines("classify").format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert (line["message"], line["level"], line["logger"]) == ("3 images\nare late", "WARNING", "jobs.x")
    assert (line["command"], line["run"]) == ("classify", "iab-vision-classify-12")
