"""Files of this machine, and of whatever else fsspec opens -> payloads.

Local files are the fast path: one open, one read. fsspec is the slow fallback for schemes that have no
client of their own here. Only regular files are read: a named pipe in an inventory must not hang a worker.
"""

import asyncio
import errno
import os
import re
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pipelines.fetch.memory import Reservation, check_size
from pipelines.fetch.retry import FetchError
from pipelines.fetch.settings import FetchLimits
from pipelines.fetch.source import ContainerVersion, Fetched, Source, Span, check_length
from pipelines.status import Status
from pipelines.storage.objects import OBJECT_SCHEMES
from pipelines.storage.storage import open_storage
from pipelines.storage.uris import is_local, local_file, scheme_of, split

T = TypeVar("T")

FSSPEC_THREADS = 32
"""Threads for fsspec's blocking reads."""

PUBLIC_SCHEMES = frozenset({"hf", "local", "memory", *OBJECT_SCHEMES})
"""fsspec schemes that an inventory may use. Others connect to a host that the URI names, without our SSRF
check, or read what another file describes; they need `allow_private_addresses` or `allow`."""

NOT_A_PATH = re.compile(r"//|(data|javascript|blob|about|mailto|https?):", re.I)
"""How URIs of web pages begin that name no file."""


def read_source(source: Source, reservation: Reservation) -> Fetched:
    """A file of this machine, or the source's span of it; blocks until there is memory for it."""
    if not source.location:
        return Fetched(Status.INVALID_URI, "the URI is empty")
    if NOT_A_PATH.match(source.location):
        error = f"neither an absolute URL nor a path: {source.location}"
        return Fetched.of(FetchError(Status.INVALID_URI, error))
    try:
        return check_length(read_local(source, reservation), source)
    except FetchError as error:
        return Fetched.of(error)


def read_local(source: Source, reservation: Reservation) -> bytes:
    """The file, or the source's span of it. Raises FetchError."""
    try:
        descriptor = os.open(local_file(source.location), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            payload = _read(descriptor, source.span, reservation)
            check_unchanged(source.planned, os.fstat(descriptor))  # after it was read, not before
            return payload
        finally:
            os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FetchError(Status.NOT_FOUND, "no such file") from error
    except PermissionError as error:
        raise FetchError(Status.DENIED, "no permission to read the file") from error
    except ValueError as error:
        raise FetchError(Status.INVALID_URI, str(error)) from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise FetchError(Status.INVALID_URI, "the path is too long") from error
        # A failing disk or mount may recover: retried in a later pass, like a connection.
        raise FetchError(Status.CONNECTION_FAILED, f"cannot read the file: {error.strerror}") from error


def check_unchanged(planned: ContainerVersion | None, status: os.stat_result) -> None:
    """Raise FetchError (`source_changed`) unless a local file is the one that was planned."""
    if planned:
        modified = datetime.fromtimestamp(status.st_mtime, UTC).isoformat()
        planned.check(status.st_size, (str(status.st_mtime_ns), modified))


def check_container(uri: str, planned: ContainerVersion | None) -> None:
    """Raise FetchError (`source_changed`) unless the file is the one that was planned."""
    if planned is None:
        return
    if is_local(uri):
        check_unchanged(planned, os.stat(local_file(uri)))  # noqa: PTH116 - bytes: any name, UTF-8 or not
        return
    folder, name = split(uri)
    storage = open_storage(folder)
    version = storage.version(name)
    planned.check(storage.size(name), (version.e_tag if version else None,))


def _read(descriptor: int, span: Span | None, reservation: Reservation) -> bytes:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise FetchError(Status.INVALID_URI, "not a regular file")
    start, length = span or (0, status.st_size)
    reservation.reserve_blocking(length)
    payload = os.pread(descriptor, length, start)
    while len(payload) < length and (
        more := os.pread(descriptor, length - len(payload), start + len(payload))
    ):
        payload += more
    return payload


class FsspecClient:
    """Owns the threads that read schemes only fsspec knows."""

    def __init__(self, limits: FetchLimits) -> None:
        self._limits = limits
        self._threads = ThreadPoolExecutor(FSSPEC_THREADS, thread_name_prefix="fetch-fsspec")

    async def get(self, uri: str, source: Source, reservation: Reservation) -> bytes:
        """One attempt: the payload. Raises FetchError."""
        span = source.span
        check_scheme(uri, self._limits)
        loop = asyncio.get_running_loop()
        n_bytes = span[1] if span else await loop.run_in_executor(self._threads, size_of, uri)
        max_bytes = self._limits.max_bytes
        await reservation.reserve(max_bytes if n_bytes is None else n_bytes)
        payload = await loop.run_in_executor(self._threads, read_any, uri, max_bytes, span)
        await loop.run_in_executor(self._threads, check_container, uri, source.planned)  # after it was read
        return payload

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def check_scheme(uri: str, limits: FetchLimits) -> None:
    """Raise FetchError for a URI through which an inventory could reach any host (SSRF)."""
    from fsspec.registry import known_implementations

    scheme = scheme_of(uri)
    private = scheme in known_implementations and scheme not in PUBLIC_SCHEMES
    allowed = limits.allow_private_addresses or scheme in map(scheme_of, limits.allow)
    if "::" in uri or (private and not allowed):
        raise FetchError(Status.BLOCKED_ADDRESS, f"this kind of URI can reach any host: {uri}")
    if scheme == "local" and not Path(uri.partition("://")[2]).is_file():
        raise FetchError(Status.NOT_FOUND, "no such file, or not a regular one")


def size_of(uri: str) -> int | None:
    """Bytes of an object of any fsspec scheme, if its filesystem knows. Raises FetchError."""
    n_bytes = _with_fsspec(uri, lambda filesystem, path: filesystem.size(path))
    return None if n_bytes is None else int(n_bytes)


def read_any(uri: str, max_bytes: int, span: Span | None = None) -> bytes:
    """An object of any fsspec scheme, or a span of it. Raises FetchError."""

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
        raise FetchError(Status.NOT_FOUND, "no such object") from error
    except PermissionError as error:
        raise FetchError(Status.DENIED, "no permission to read the object") from error
    except TimeoutError as error:
        raise FetchError(Status.TIMEOUT, str(error)) from error
    except (ValueError, ImportError) as error:
        raise FetchError(Status.INVALID_URI, str(error)) from error
    except Exception as error:  # each fsspec filesystem raises its own client's exceptions
        raise FetchError(Status.CONNECTION_FAILED, f"{type(error).__name__}: {error}") from error
