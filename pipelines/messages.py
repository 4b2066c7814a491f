"""The errors that a command explains without a traceback, and what of any error may be shown to people."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

CAUSE = re.compile(r"^[ \t]+\S.*\n(?P<kind>[\w.]+)(?P<words>:[^\n]*(?:\n\S[^\n]*)*)?$", re.MULTILINE)
"""The line below the first traceback: Ray passes on the error's text, not the error."""

QUERY_VALUE = re.compile(r"([?&][^=&?\s]*=)[^&\s]+")
"""Every value: each service has its own names for signatures."""

USERINFO = re.compile(
    r"(\b[a-z][a-z0-9+.-]{0,20}://)(?:[^/\s?]{0,2000}|[^/\s?:@]{0,200}:(?!\d*/)[^\s?@]{0,2000})@", re.I
)
"""Also a password with a slash in it, which parsers take for the path; digits before a slash are a port.
The lengths are bounded, or the time would be quadratic in that of a hostile text."""


def first_line(error: Exception) -> str:
    """The first line of the error's text; its type if the text is empty, as with time-outs."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def root_cause(report: str) -> str:
    """One line, such as `OSError: [Errno 28] No space left on device`; the last without a traceback."""
    found = CAUSE.search(report)
    if found is None:
        return (report.strip().splitlines() or ["no reason given"])[-1]
    kind = found["kind"].rpartition(".")[2]
    return kind + " ".join((found["words"] or "").split("\n"))


def redact(text: str) -> str:
    """The text with user names, passwords and the values of queries taken out of every URI in it."""
    return QUERY_VALUE.sub(r"\1REDACTED", USERINFO.sub(r"\1", text))


def redacted(value: Any) -> Any:
    """`redact` for every string in plain data, keys included, before it is written as JSON or YAML."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redacted(key): redacted(inner) for key, inner in value.items()}
    return [redacted(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def suggestion(name: str, known: Sequence[str]) -> str:
    """The name that was probably meant, as a question in brackets; empty where none is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f" (did you mean {close[0]}?)" if close else ""


class CommandError(Exception):
    """A failure that is explained to the user without a traceback: the value, the limit, what to do."""


class JobFailed(CommandError):
    """The job ran and failed; what it committed is kept, and the same command continues it."""


class InputError(CommandError):
    """The input or the config is wrong; nothing was started and nothing was written."""


class OtherRun(InputError):
    """The state folder holds a run of something else."""


class Refused(CommandError):
    """A quality gate said no: parity, or the error budget."""


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGINT arrived; its text is the signal's name.

    While a driver waits in `ray.get`, Ray passes on a KeyboardInterrupt, and drops a handler's other errors.
    """
