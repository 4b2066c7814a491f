"""An error -> one line for a person; of Ray's report, a page of traces, the error that began it."""

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
