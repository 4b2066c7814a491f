"""What wrong input becomes: one paragraph with the value, the limit and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from pipelines.messages import InputError
from pipelines.specs import wrong_settings
from pipelines.storage.uris import StorageRefused


@contextmanager
def checking_input() -> Iterator[None]:
    """Report wrong settings, and a path that is not there or may not be used, as an `InputError`."""
    try:
        yield
    except ValidationError as error:
        raise InputError(wrong_settings(error)) from error
    except StorageRefused as error:
        raise InputError(str(error)) from error
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        reason = (error.strerror or "").lower()
        raise InputError(
            f"{error.filename}: {reason}" if error.filename and reason else str(error)
        ) from error
