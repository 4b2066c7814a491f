"""Exit codes of the errors that end a command, and what wrong input becomes.

Everything a user can mend reaches them as one paragraph: the value, the limit, what to do.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.messages import CommandError, InputError, JobFailed, Refused

EXIT_CODES: dict[type[CommandError], int] = {JobFailed: 1, InputError: 2, Refused: 3}


def exit_code(error: CommandError) -> int:
    """The exit code of an error, or of the error that it is a kind of."""
    return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))


@contextmanager
def checking_input() -> Iterator[None]:
    """Report what the libraries below raise for a wrong value or path as an `InputError`."""
    try:
        yield
    except (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise InputError(str(error) or type(error).__name__) from error
