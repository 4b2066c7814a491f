"""What every storage back end answers with: entries, versions, errors, and the temporary names it hides."""

import re
import uuid
from dataclasses import dataclass
from datetime import datetime

TEMPORARY = re.compile(r"^\..+\.[0-9a-f]{32}\.tmp$")


class AlreadyExists(FileExistsError):
    """The path holds other bytes than those that were to be created there."""


class StorageError(OSError):
    """The storage refused or could not be reached; says which URI and what to look at."""


@dataclass(frozen=True)
class Entry:
    """One stored file as a listing shows it; `path` is relative to the storage's root."""

    path: str
    size: int
    etag: str | None
    last_modified: datetime | None


@dataclass(frozen=True)
class Version:
    """What tells one state of an object from those before and after it, as its store names them."""

    e_tag: str | None
    version: str | None


def temporary_name(path: str) -> str:
    """A fresh name beside `path` to write under before a rename; no listing shows it."""
    folder, separator, name = path.rpartition("/")
    return f"{folder}{separator}.{name}.{uuid.uuid4().hex}.tmp"


def is_temporary(path: str) -> bool:
    """Whether the path is such a name, perhaps left by a process that died while writing."""
    return TEMPORARY.match(path.rpartition("/")[2]) is not None
