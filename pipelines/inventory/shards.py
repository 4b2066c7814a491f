"""WebDataset tar shards -> where each image is inside: a byte range that is then fetched by itself.

Headers are read in one pass over each shard; large bodies are skipped. The samples' other members (captions,
labels) are not read; `key` joins predictions to them.

A shard counts only if it is whole to its last byte: after an end-of-archive mark comes another tar (as
`cat` puts several into one file; it is read on, as by GNU tar's --ignore-zeros), or nothing but zeros.
Python's reader, and with it many others, takes a damaged header for the end and drops what follows it.

What was found in each shard is kept below the state folder until the plan is frozen: planning that was
interrupted goes on with the shards that are missing.
"""

import hashlib
import io
import logging
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.images.formats import is_image_name
from pipelines.inventory.plan import FoundFile
from pipelines.machine import R, T, map_ahead
from pipelines.messages import InputError, redact
from pipelines.storage.storage import Storage, open_storage
from pipelines.storage.uris import split

READ_BYTES = 1 << 20
"""Read at a time, headers and small bodies together."""
FAR = 128 << 10
"""A body of this length is skipped: on an object store reading it would take as long as a request."""
HEADER_BYTES = 8 << 10
"""Read behind such a body, where the next long one may begin."""

SHARDS_AT_ONCE = 64
"""On an object store planning waits for requests; a header takes a core for 0.1 ms."""
FOUND = "plan/tars"
"""Folder, below the state folder, of what was found in each shard."""
SHOWN_EVERY_S = 10.0

MEMBERS = pa.schema(
    [
        pa.field("uri", pa.string()),
        pa.field("container", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("key", pa.string()),
    ]
)
"""One row per image: `uri` is `<shard>#<member>`, `key` the member's path up to the first dot of its name."""

log = logging.getLogger(__name__)

Spread = Callable[[Callable[[FoundFile], pa.Table], Sequence[FoundFile]], Iterator[pa.Table]]
"""Like `map`: threads of this process, or tasks on a cluster."""


def list_members(
    files: Sequence[FoundFile], state: Storage, *, all_files: bool, spread: Spread | None = None
) -> Iterator[pa.Table]:
    """The images of each shard, shard by shard in the order given; logs how far it is.

    Raises:
        InputError: a shard is no plain tar, is damaged, was cut anywhere, or has images that are links.
    """
    shown = time.monotonic()
    listed = (spread or in_threads)(partial(_find_members, state.uri, all_files), files)
    for number, members in enumerate(listed, 1):
        if time.monotonic() > shown + SHOWN_EVERY_S:
            log.info("planned %s of %s tars", f"{number:,}", f"{len(files):,}")
            shown = time.monotonic()
        yield members


def forget_members(state: Storage) -> None:
    """Remove what was found: the plan holds it."""
    state.delete(*(file.path for file in state.list(FOUND)))


def in_threads(call: Callable[[T], R], inputs: Sequence[T]) -> Iterator[R]:
    """`map_ahead` with as many threads as suit an object store."""
    return map_ahead(call, inputs, threads=SHARDS_AT_ONCE, ahead=SHARDS_AT_ONCE)


def _find_members(state_uri: str, all_files: bool, file: FoundFile) -> pa.Table:
    """The images of a shard: as they were found by a run that was interrupted, else by reading it."""
    state = open_storage(state_uri)
    name = hashlib.sha256(repr((1, file, all_files)).encode()).hexdigest()
    with suppress(FileNotFoundError):
        return pq.read_table(pa.BufferReader(state.read(f"{FOUND}/{name}.parquet")))
    members = members_of(file.uri, all_files)
    sink = io.BytesIO()
    pq.write_table(members, sink, compression="zstd")
    state.put(f"{FOUND}/{name}.parquet", sink.getvalue())
    return members


def members_of(uri: str, all_files: bool) -> pa.Table:
    """The images of a shard, or all its files. Raises InputError as `list_members`."""
    rows = []
    place = "at its beginning"
    try:
        with io.BufferedReader(_Skipping(uri), READ_BYTES) as file:
            for member in _walk(file):
                name = member.name
                place = f"at or after the member {name}"
                if member.isdir() or not (all_files or _is_image(name)):
                    continue
                if not member.isreg() or member.issparse():
                    raise InputError(
                        f"{redact(uri)} holds {name} as a link, a sparse file or a device, not as bytes in "
                        "one place: pack it with tar --dereference --hard-dereference and without --sparse"
                    )
                rows.append((f"{uri}#{name}", uri, member.offset_data, member.size, _key(name)))
                name.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{redact(uri)} holds a member whose name is not UTF-8, {name!a}, which no table can hold: "
            "pack it under another name"
        ) from error
    except tarfile.TarError as error:
        raise InputError(
            f"{redact(uri)} cannot be read as a tar {place}: {error}. Shards must be whole and not "
            "compressed, for an image inside is fetched by its byte range: fetch or pack it again"
        ) from error
    columns = zip(*rows, strict=True) if rows else ([] for _ in MEMBERS)
    return pa.table(
        [pa.array(list(column), field.type) for column, field in zip(columns, MEMBERS, strict=True)], MEMBERS
    )


class _Skipping(io.RawIOBase):
    """A file of any storage, of which little is read after a long jump."""

    def __init__(self, uri: str) -> None:
        folder, self._name = split(uri)
        self._storage = open_storage(folder)
        self._size = self._storage.size(self._name)
        self._at = 0
        self._read_to = -FAR

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = (0, self._at, self._size)[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        most = HEADER_BYTES if self._at - self._read_to >= FAR else len(buffer)
        stop = min(self._at + min(most, len(buffer)), self._size)
        if stop <= self._at:
            return 0
        piece = self._storage.read_range(self._name, self._at, stop)
        buffer[: len(piece)] = piece
        self._at = self._read_to = self._at + len(piece)
        return len(piece)


def _walk(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Every member of every archive in the file. Raises TarError unless it is whole."""
    start: int | None = 0
    while start is not None:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                tar.members.clear()  # type: ignore[attr-defined]  # or it would remember every member of a shard of millions
                yield member
            start = _after_end_mark(file, tar.offset)


def _after_end_mark(file: IO[bytes], offset: int) -> int | None:
    """Where the file goes on after the zeros at `offset`, or None if it does not."""
    file.seek(offset)
    zeros = 0
    while (block := file.read(tarfile.BLOCKSIZE)) and not block.strip(b"\0"):
        zeros += len(block)
    if zeros >= tarfile.BLOCKSIZE:
        return offset + zeros if block else None
    raise tarfile.ReadError(
        f"the header at byte {offset:,} is damaged" if block else "it has no end-of-archive mark: it was cut"
    )


def _is_image(name: str) -> bool:
    last = name.rpartition("/")[2]
    return not last.startswith(".") and is_image_name(last)


def _key(name: str) -> str:
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.split(".", 1)[0]
