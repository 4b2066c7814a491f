"""What the storages share: the text of URIs, listing entries, versions, errors and temporary names."""

import os
import re
import uuid
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.parse import unquote_to_bytes

TEMPORARY = re.compile(r"^\..+\.[0-9a-f]{32}\.tmp$")


class AlreadyExists(FileExistsError):
    """The path already holds other bytes."""


class StorageError(OSError):
    """The storage refused or could not be reached; the message names the URI and what to check."""


class StorageRefused(StorageError):
    """There is no such bucket, or the credentials do not permit this: asking again does not help."""


@dataclass(frozen=True)
class Entry:
    """One stored file as a listing shows it; `path` is relative to the storage's root."""

    path: str
    size: int
    etag: str | None
    last_modified: datetime | None

    @property
    def is_hidden(self) -> bool:
        """Whether its name, or that of a folder on the way, begins with a dot."""
        return any(part.startswith(".") for part in self.path.split("/"))


@dataclass(frozen=True)
class Version:
    """Identifies one state of an object, in the store's terms."""

    e_tag: str | None
    version: str | None


def scheme_of(uri: str) -> str:
    """The URI's scheme in lower case; a plain path is `file`."""
    head, separator, _ = uri.partition("://")
    return head.lower() if separator else "file"


def is_local(uri: str) -> bool:
    """Whether the URI is a path on this machine."""
    return scheme_of(uri) == "file"


def local_path(uri: str) -> Path:
    """The absolute path of a local URI."""
    return Path(os.fsdecode(local_file(uri))).absolute()


def local_file(uri: str) -> bytes:
    """The path of a plain path or `file://` URI (percent-decoded), as the filesystem's bytes."""
    if "://" not in uri:
        return os.fsencode(os.path.expanduser(uri))  # noqa: PTH111 - bytes: any name, UTF-8 or not
    return b"/" + unquote_to_bytes(uri.partition("://")[2].removeprefix("localhost").lstrip("/"))


def join(uri: str, *names: str) -> str:
    """The URI of something below a folder URI."""
    return "/".join([uri.rstrip("/"), *(name.strip("/") for name in names)])


def split(uri: str) -> tuple[str, str]:
    """A file's URI as its folder and its name, which on the web includes the query."""
    path, mark, query = uri.partition("?") if scheme_of(uri) in ("http", "https") else (uri, "", "")
    folder, _, name = path.rstrip("/").rpartition("/")
    return folder or ("/" if uri.startswith("/") else "."), name + mark + query


def file_name(uri: str) -> str:
    """The name of a file as people read it: of one on the web without the query, which may be signed."""
    name = split(uri)[1]
    return name.partition("?")[0] if scheme_of(uri) in ("http", "https") else name


def temporary_name(path: str) -> str:
    """A unique name in the folder of `path` to write to before a rename; no listing shows it."""
    folder, separator, name = path.rpartition("/")
    return f"{folder}{separator}.{name}.{uuid.uuid4().hex}.tmp"


def is_temporary(path: str) -> bool:
    """Whether the path is a temporary name, perhaps left by a process that died while writing."""
    return TEMPORARY.match(path.rpartition("/")[2]) is not None
