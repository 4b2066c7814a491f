"""A storage whose every operation passes through a hook: the seam at which tests crash and interleave."""

from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipelines.storage.storage import Storage
from pipelines.storage.uris import AlreadyExists, Version

Hook = Callable[[str, tuple[Any, ...], Callable[[], Any]], Any]
"""hook(operation, its arguments, proceed) -> result."""


class HookedStorage:
    """Does what the storage beneath does, when the hook lets it."""

    def __init__(self, beneath: Storage, hook: Hook) -> None:
        self._beneath, self._hook = beneath, hook

    @property
    def uri(self) -> str:
        return self._beneath.uri

    @property
    def fenced(self) -> bool:
        return self._beneath.fenced

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._beneath, name)
        return lambda *args: self._hook(name, args, partial(method, *args))


class Unfenced(HookedStorage):
    """The same without the conditional put: the first thing to take away when a test must fail."""

    def __init__(self, beneath: Storage, hook: Hook) -> None:
        super().__init__(beneath, hook)

    def create(self, path: str, payload: bytes) -> None:
        self._hook("create", (path, payload), partial(self._beneath.put, path, payload))

    def put_file_over(self, path: str, local_file: Path, seen: Version | None) -> None:
        self._hook("put_file_over", (path,), partial(self._beneath.put_file, path, local_file))


class Bucket(HookedStorage):
    """A local folder as an object store shows it: no spool next to it, and files put on a condition."""

    @property
    def uri(self) -> str:
        return f"bucket:/{self._beneath.uri}"

    def version(self, path: str) -> Version | None:
        found: Version | None = self._hook("version", (path,), partial(self._version, path))
        return found

    def put_file_over(self, path: str, local_file: Path, seen: Version | None) -> None:
        self._hook("put_file_over", (path,), partial(self._put_file_over, path, local_file, seen))

    def _version(self, path: str) -> Version | None:
        if not self._beneath.exists(path):
            return None
        return Version(sha256(self._beneath.read(path)).hexdigest(), None)

    def _put_file_over(self, path: str, local_file: Path, seen: Version | None) -> None:
        if self._version(path) != seen and self._beneath.read(path) != local_file.read_bytes():
            raise AlreadyExists(path)
        self._beneath.put(path, local_file.read_bytes())


class BlindBucket(Bucket):
    """The same without the condition."""

    def _put_file_over(self, path: str, local_file: Path, seen: Version | None) -> None:
        self._beneath.put(path, local_file.read_bytes())
