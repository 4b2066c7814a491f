"""A folder named by a URI -> read, atomic put, create-if-absent, list, delete: the same on any storage.

Three back ends: the local filesystem; S3, Google Cloud Storage and Azure through obstore, which has the
conditional put that the ledger's fence needs; any other scheme through fsspec, where create-if-absent
is only a check (`fenced` is False). Credentials come from the environment's usual chains only.
"""

import hashlib
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.messages import InputError, redact
from pipelines.storage.local import LocalStorage
from pipelines.storage.objects import OBJECT_SCHEMES, PATIENCE_S, ObjectStorage
from pipelines.storage.other import FsspecStorage
from pipelines.storage.uris import (
    Entry,
    Version,
    file_name,
    local_path,
    scheme_of,
    split,
)

HASHED_AT_ONCE = 8 << 20


class Storage(Protocol):
    """A folder somewhere; every path is relative to it and uses `/`. Picklable: it crosses Ray."""

    @property
    def uri(self) -> str:
        """The folder, without a trailing slash."""

    @property
    def fenced(self) -> bool:
        """Whether `create` is atomic across processes; False where it is only a check."""

    def read(self, path: str) -> bytes:
        """The whole file. Raises FileNotFoundError."""

    def put(self, path: str, payload: bytes) -> None:
        """Write or replace the file: a reader sees all of the old bytes or all of the new."""

    def put_file(self, path: str, local_file: Path) -> None:
        """`put` from a local file of any size, which is moved where a rename is possible."""

    def version(self, path: str) -> Version | None:
        """The file's current version; None if it is missing, or a file of this machine."""

    def put_file_over(self, path: str, local_file: Path, seen: Version | None) -> None:
        """`put_file` if the file is still as `seen`. Raises AlreadyExists if it holds other bytes.

        In one step on object stores, up to `SINGLE_PUT_BYTES`. Elsewhere it is `put_file`:
        there a late writer is stopped by removing its `local_file`.
        """

    def create(self, path: str, payload: bytes) -> None:
        """`put` a file that does not exist. Raises AlreadyExists if it does, with other bytes.

        Finding exactly these bytes counts as success: a client repeats a request whose answer got lost and
        then finds its own object. A payload with a nonce tells two writers apart.
        """

    def exists(self, path: str) -> bool:
        """Whether the file is there."""

    def size(self, path: str) -> int:
        """Bytes of the file. Raises FileNotFoundError."""

    def list(self, prefix: str = "") -> list[Entry]:
        """Every file below the folder `prefix`, at any depth, by path; none if it does not exist."""

    def delete(self, *paths: str) -> None:
        """Remove the files; no error for one that is not there."""

    def open_input(self, path: str) -> Any:
        """A pyarrow RandomAccessFile over the file."""

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the file. Raises FileNotFoundError, StorageError if it serves no ranges."""

    def filesystem_and_path(self) -> tuple[pafs.FileSystem, str]:
        """What `pyarrow.dataset` takes to read this folder."""


def open_storage(uri: str, *, patience_s: float = PATIENCE_S) -> Storage:
    """The storage rooted at a folder URI or local path; makes no request.

    Raises InputError where a bucket's name is missing; for an unknown scheme the first use does.
    """
    scheme = scheme_of(uri)
    if scheme == "file":
        return LocalStorage(local_path(uri))
    if scheme in OBJECT_SCHEMES:
        if uri.partition("://")[2][:1] in ("", "/"):
            raise InputError(f"{redact(uri)} names no bucket; write {scheme}://BUCKET/FOLDER")
        return ObjectStorage(uri.rstrip("/"), patience_s)
    return FsspecStorage(uri.rstrip("/"))


def read_uri(uri: str) -> bytes:
    """The bytes of one file by its whole URI. Raises FileNotFoundError."""
    folder, name = split(uri)
    return open_storage(folder).read(name)


def sha256_of(storage: Storage, path: str) -> str:
    """The checksum of one file of any size, in hexadecimal."""
    digest = hashlib.sha256()
    with storage.open_input(path) as file:
        while block := file.read(HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def open_input(uri: str) -> Any:
    """A pyarrow file over one file by its whole URI, unpacked if its name ends in `.gz`."""
    folder, name = split(uri)
    file = open_storage(folder).open_input(name)
    if file_name(uri).lower().endswith(".gz"):
        return pa.CompressedInputStream(file, "gzip")
    return file
