"""Any folder that fsspec opens as a storage: no conditional put there, so `create` is only a check."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.messages import InputError, redact
from pipelines.storage.uris import (
    AlreadyExists,
    Entry,
    StorageError,
    Version,
    is_temporary,
    join,
    temporary_name,
)


@dataclass(frozen=True)
class FsspecStorage:
    """Any other scheme that fsspec opens; without a conditional put, so without a fence."""

    uri: str
    fenced = False

    def __reduce__(self) -> tuple[Any, ...]:
        return FsspecStorage, (self.uri,)

    @cached_property
    def opened(self) -> tuple[Any, str]:
        """The fsspec filesystem and the folder's path on it, opened on first use in each process."""
        import fsspec

        try:
            filesystem, folder = fsspec.core.url_to_fs(self.uri)
        except (ValueError, ImportError) as error:  # an unknown scheme, or one whose package is missing
            raise InputError(
                f"{redact(self.uri)} cannot be opened: {error}. Local paths, s3://, gs://, az://, hf:// and "
                "https:// can"
            ) from error
        return filesystem, folder.rstrip("/")

    def read(self, path: str) -> bytes:
        filesystem, folder = self.opened
        return bytes(filesystem.cat_file(f"{folder}/{path}"))

    def put(self, path: str, payload: bytes) -> None:
        with self._replacing(path) as (filesystem, temporary):
            filesystem.pipe_file(temporary, payload)

    def put_file(self, path: str, local_file: Path) -> None:
        with self._replacing(path) as (filesystem, temporary):
            filesystem.put_file(str(local_file), temporary)

    def version(self, path: str) -> Version | None:
        filesystem, folder = self.opened
        try:
            info = filesystem.info(f"{folder}/{path}")
        except FileNotFoundError:
            return None
        names = ("e_tag", "ETag", "etag", "Last-Modified", "mtime", "created")
        return Version(next((str(info[name]) for name in names if info.get(name)), None), None)

    def put_file_over(self, path: str, local_file: Path, seen: Version | None) -> None:
        self.put_file(path, local_file)

    def create(self, path: str, payload: bytes) -> None:
        if not self.exists(path):
            self.put(path, payload)
        elif self.read(path) != payload:
            raise AlreadyExists(f"{join(self.uri, path)} exists already")

    def exists(self, path: str) -> bool:
        filesystem, folder = self.opened
        return bool(filesystem.isfile(f"{folder}/{path}"))

    def size(self, path: str) -> int:
        filesystem, folder = self.opened
        return int(filesystem.size(f"{folder}/{path}"))

    def list(self, prefix: str = "") -> list[Entry]:
        filesystem, folder = self.opened
        found = _walk(filesystem, f"{folder}/{prefix}".rstrip("/"))
        entries = [_make_entry(info, folder) for info in found if not is_temporary(info["name"])]
        return sorted(entries, key=lambda entry: entry.path)

    def delete(self, *paths: str) -> None:
        filesystem, folder = self.opened
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                filesystem.rm_file(f"{folder}/{path}")

    def open_input(self, path: str) -> Any:
        filesystem, folder = self.opened
        # Not pyarrow's open_input_file: it asks isfile() first, to which any failure means "no such file".
        return pa.PythonFile(filesystem.open(f"{folder}/{path}", "rb"), mode="r")

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        filesystem, folder = self.opened
        payload = bytes(filesystem.cat_file(f"{folder}/{path}", start, stop))
        if len(payload) > stop - start:
            raise StorageError(f"{redact(join(self.uri, path))} is not served in byte ranges")
        return payload

    def filesystem_and_path(self) -> tuple[pafs.FileSystem, str]:
        filesystem, folder = self.opened
        return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), folder

    @contextlib.contextmanager
    def _replacing(self, path: str) -> Iterator[tuple[Any, str]]:
        """Write under a temporary name, then move: so that no filesystem shows half a file."""
        filesystem, folder = self.opened
        target = f"{folder}/{path}"
        temporary = temporary_name(target)
        filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
        yield filesystem, temporary
        filesystem.mv(temporary, target)


def _walk(filesystem: Any, folder: str) -> Iterator[dict[str, Any]]:
    """Every file below a folder. Not fsspec's `find`: it skips folders that cannot be read."""
    try:
        found = filesystem.ls(folder, detail=True)
    except FileNotFoundError:  # there is none, or it was removed during the listing
        return
    for info in found:
        name = info["name"].rstrip("/")
        if info["type"] != "directory":
            yield info
        elif name != folder:
            yield from _walk(filesystem, name)


def _make_entry(info: dict[str, Any], folder: str) -> Entry:
    """An fsspec listing row as an Entry; filesystems name the time and the ETag differently."""
    times = ("last_modified", "LastModified", "mtime", "created")
    modified = next((info[key] for key in times if key in info), None)
    if isinstance(modified, int | float):
        modified = datetime.fromtimestamp(modified, UTC)
    path = str(info["name"]).removeprefix(folder).lstrip("/")
    return Entry(path, int(info["size"] or 0), info.get("etag") or info.get("ETag"), modified)
