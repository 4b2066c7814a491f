"""Files of this machine, and of whatever else fsspec opens -> bytes: blocking reads for a thread pool.

Local files are the fast path: one open, one read. fsspec is the slow fallback for schemes that have no
client of their own here. Only regular files are read: a named pipe in an inventory must not hang a worker.
"""

import os
import stat
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

from pipelines.fetch.memory import check_size
from pipelines.fetch.retry import Failure
from pipelines.status import Status
from pipelines.storage.uris import scheme_of

T = TypeVar("T")

HOST_SCHEMES = frozenset("ftp sftp ssh smb webhdfs hdfs dask jlab jupyter github gitlab git".split())  # noqa: SIM905
"""fsspec schemes that connect to a host which the URI names: an inventory must not choose it unchecked."""


def local_file(uri: str) -> bytes:
    """The path of a plain path or `file://` URI (percent-decoded), as the filesystem's bytes."""
    if scheme_of(uri) != "file" or "://" not in uri:
        return os.fsencode(os.path.expanduser(uri))  # noqa: PTH111 - bytes: any name, UTF-8 or not
    return b"/" + unquote_to_bytes(uri.partition("://")[2].removeprefix("localhost").lstrip("/"))


def read_local(
    uri: str, max_bytes: int, span: tuple[int, int] | None, reserve: Callable[[int], None]
) -> bytes:
    """The file, or `span` (first byte, length) of it. Raises Failure.

    Args:
        reserve: told how many bytes memory is about to hold, and may block.
    """
    try:
        descriptor = os.open(local_file(uri), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return _read(descriptor, max_bytes, span, reserve)
        finally:
            os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Failure(Status.NOT_FOUND, "no such file") from error
    except PermissionError as error:
        raise Failure(Status.DENIED, "no permission to read the file") from error
    except ValueError as error:
        raise Failure(Status.INVALID_URI, str(error)) from error
    except OSError as error:
        # A disk or a mount that stumbles may recover: repeated, like a connection.
        raise Failure(Status.CONNECTION_FAILED, f"cannot read the file: {error.strerror}") from error


def _read(
    descriptor: int, max_bytes: int, span: tuple[int, int] | None, reserve: Callable[[int], None]
) -> bytes:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise Failure(Status.INVALID_URI, "not a regular file")
    start, length = span or (0, status.st_size)
    check_size(length, max_bytes)
    reserve(length)
    payload = os.pread(descriptor, length, start)
    while len(payload) < length and (
        more := os.pread(descriptor, length - len(payload), start + len(payload))
    ):
        payload += more
    return payload


def check_scheme(uri: str, allow_private_addresses: bool) -> None:
    """Raise Failure for a URI that fsspec would follow to a host of the inventory's choosing."""
    scheme = scheme_of(uri)
    if "::" in uri or (scheme in HOST_SCHEMES and not allow_private_addresses):
        raise Failure(Status.BLOCKED_ADDRESS, f"this kind of URI can reach any host: {uri}")


def size_of(uri: str) -> int | None:
    """Bytes of an object of any fsspec scheme, if its filesystem knows. Raises Failure."""
    n_bytes = _with_fsspec(uri, lambda filesystem, path: filesystem.size(path))
    return None if n_bytes is None else int(n_bytes)


def read_any(uri: str, max_bytes: int, span: tuple[int, int] | None = None) -> bytes:
    """An object of any fsspec scheme, or a span of it. Raises Failure."""

    def read(filesystem: Any, path: str) -> bytes:
        if span:
            return bytes(filesystem.cat_file(path, start=span[0], end=span[0] + span[1]))
        with filesystem.open(path, "rb") as file:
            return bytes(file.read(max_bytes + 1))

    payload = _with_fsspec(uri, read)
    check_size(len(payload), max_bytes)
    return payload


def _with_fsspec(uri: str, call: Callable[[Any, str], T]) -> T:
    import fsspec

    try:
        return call(*fsspec.core.url_to_fs(uri))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise Failure(Status.NOT_FOUND, "no such object") from error
    except PermissionError as error:
        raise Failure(Status.DENIED, "no permission to read the object") from error
    except TimeoutError as error:
        raise Failure(Status.TIMEOUT, str(error)) from error
    except (ValueError, ImportError) as error:
        raise Failure(Status.INVALID_URI, str(error)) from error
    except Exception as error:  # each fsspec filesystem raises its own client's exceptions
        raise Failure(Status.CONNECTION_FAILED, f"{type(error).__name__}: {error}") from error
