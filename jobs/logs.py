"""How a command's log lines look: text for people, or one JSON object a line for collectors."""

import json
import logging
import os
import sys
import uuid
from datetime import UTC, datetime
from typing import Literal, TextIO

LogFormat = Literal["text", "json"]
RUN = "SUBMISSION_ID"
"""Variable by which a submitted job knows its name, the same for each attempt."""


def start_logging(form: LogFormat, command: str) -> None:
    """Our own progress at INFO; of the libraries only what is wrong."""
    handler = StandardError()
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S%z")
    handler.setFormatter(text if form == "text" else JsonLines(command))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for package in ("jobs", "export", "pipelines"):
        logging.getLogger(package).setLevel(logging.INFO)


class StandardError(logging.StreamHandler[TextIO]):
    """Writes to standard error as it is now: a bar on a terminal replaces it, to stay below the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        self.stream = sys.stderr
        super().emit(record)


class JsonLines(logging.Formatter):
    """One JSON object for each record, with the command and the run that it belongs to."""

    def __init__(self, command: str) -> None:
        super().__init__()
        self._run = {"command": command, "run": os.environ.get(RUN) or uuid.uuid4().hex[:12]}

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON; a traceback is one of its values."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._run,
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
