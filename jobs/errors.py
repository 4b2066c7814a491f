"""The three ways a command can end badly, and their exit codes.

Everything a user can mend reaches them as one paragraph: the value, the limit, what to do.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class CommandError(Exception):
    """A failure that is explained to the user without a traceback."""

    exit_code = 1


class JobFailed(CommandError):
    """The job ran and failed; what it committed is kept, and the same command continues it."""


class InputError(CommandError):
    """The input or the config is wrong; nothing was started and nothing was written."""

    exit_code = 2


class Refused(CommandError):
    """A quality gate said no: parity, or the error budget."""

    exit_code = 3


@contextmanager
def checking_input() -> Iterator[None]:
    """Report what the libraries below raise for a wrong value or path as an `InputError`."""
    try:
        yield
    except (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise InputError(str(error) or type(error).__name__) from error
