"""A folder of this machine or a network mount as a storage: every write is synced, then renamed or linked."""

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from pipelines.storage.uris import AlreadyExists, Entry, StorageError, Version, is_temporary, temporary_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalStorage:
    """A folder of this machine, or of a network mount."""

    root: Path
    fenced = True

    @property
    def uri(self) -> str:
        return str(self.root)

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def put(self, path: str, payload: bytes) -> None:
        with self._temporary(path) as temporary:
            _write_synced(temporary, payload)
            temporary.replace(self.root / path)
        _sync_folder((self.root / path).parent)

    def put_file(self, path: str, local_file: Path) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            _sync_file(local_file)
            local_file.replace(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            with self._temporary(path) as temporary:
                shutil.copyfile(local_file, temporary)
                _sync_file(temporary)
                temporary.replace(target)
        _sync_folder(target.parent)

    def version(self, path: str) -> None:
        return None

    def put_file_over(self, path: str, local_file: Path, seen: Version | None) -> None:
        self.put_file(path, local_file)

    def create(self, path: str, payload: bytes) -> None:
        target = self.root / path
        with self._temporary(path) as temporary:
            _write_synced(temporary, payload)
            try:
                # A hard link is the one local call that is both all-or-nothing and create-if-absent.
                target.hardlink_to(temporary)
            except FileExistsError:
                if target.read_bytes() != payload:
                    raise AlreadyExists(f"{target} exists already") from None
            except OSError as error:
                raise StorageError(
                    f"{self.uri} cannot hold a ledger: its filesystem has no hard links ({error.strerror}), "
                    "so two drivers could not be told apart; choose another disk or an object store, "
                    f"or name the folder local://{self.root} and never start two drivers on it"
                ) from error
        _sync_folder(target.parent)

    def exists(self, path: str) -> bool:
        return (self.root / path).is_file()

    def size(self, path: str) -> int:
        return (self.root / path).stat().st_size

    def list(self, prefix: str = "") -> list[Entry]:
        return sorted(self._walk(self.root / prefix), key=lambda entry: entry.path)

    def delete(self, *paths: str) -> None:
        for path in paths:
            (self.root / path).unlink(missing_ok=True)

    def open_input(self, path: str) -> Any:
        return pafs.LocalFileSystem().open_input_file(str(self.root / path))

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        with (self.root / path).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def filesystem_and_path(self) -> tuple[pafs.FileSystem, str]:
        return pafs.LocalFileSystem(), str(self.root)

    @contextlib.contextmanager
    def _temporary(self, path: str) -> Iterator[Path]:
        """A temporary file in the target's folder, which no listing shows; removed afterwards."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(temporary_name(str(target)))
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _walk(self, folder: Path) -> Iterator[Entry]:
        left_out = []
        for parent, folders, names in os.walk(folder, onerror=_raise_unless_gone):
            left_out += [path for path in (Path(parent, name) for name in folders) if path.is_symlink()]
            for name in names:
                path = Path(parent, name)
                try:
                    if not is_temporary(name):
                        yield self._entry(path, path.stat())
                except FileNotFoundError:
                    left_out += [path] if path.is_symlink() else []  # else removed during the listing
        if left_out:
            log.warning(
                "%s: %d links are left out, which lead to folders or nowhere, such as %s",
                folder, len(left_out), left_out[0],
            )  # fmt: skip

    def _entry(self, path: Path, status: os.stat_result) -> Entry:
        modified = datetime.fromtimestamp(status.st_mtime, UTC)
        return Entry(path.relative_to(self.root).as_posix(), status.st_size, None, modified)


def _raise_unless_gone(error: OSError) -> None:
    """Raise for a folder that cannot be read, instead of leaving it out; not for one just removed."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _write_synced(path: Path, payload: bytes) -> None:
    """Write and fsync: otherwise a rename may survive a power cut while the bytes do not."""
    with path.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def _sync_file(path: Path) -> None:
    """fsync a closed file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """fsync a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
