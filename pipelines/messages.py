"""The errors that a command explains without a traceback, and one line for a person from any other error."""

import re

CAUSE = re.compile(r"^[ \t]+\S.*\n(?P<kind>[\w.]+)(?P<words>:[^\n]*(?:\n\S[^\n]*)*)?$", re.MULTILINE)
"""What stands below the first trace: Ray gives the error's text alone, not the error."""


def first_line(error: Exception) -> str:
    """What the error says first; its type where it says nothing, as time-outs do."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def root_cause(report: str) -> str:
    """One line, such as `OSError: [Errno 28] No space left on device`; without a trace the report's last."""
    found = CAUSE.search(report)
    if found is None:
        return (report.strip().splitlines() or ["no reason given"])[-1]
    kind = found["kind"].rpartition(".")[2]
    return kind + " ".join((found["words"] or "").split("\n"))


class CommandError(Exception):
    """A failure that is explained to the user without a traceback: the value, the limit, what to do."""


class JobFailed(CommandError):
    """The job ran and failed; what it committed is kept, and the same command continues it."""


class InputError(CommandError):
    """The input or the config is wrong; nothing was started and nothing was written."""


class Refused(CommandError):
    """A quality gate said no: parity, or the error budget."""


class Stopped(BaseException):
    """SIGTERM or SIGINT arrived; its text is the signal's name."""
