"""What wrong input becomes: one paragraph with the value, the limit and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from pipelines.messages import InputError
from pipelines.specs import wrong_settings


@contextmanager
def checking_input() -> Iterator[None]:
    """Report what the libraries below raise for a wrong value or path as an `InputError`."""
    try:
        yield
    except ValidationError as error:
        raise InputError(wrong_settings(error)) from error
    except (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise InputError(str(error) or type(error).__name__) from error
