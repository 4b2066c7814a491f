"""What earlier nights know of tonight's images, in two memory-mapped Arrow files that a night's plan writes.

    state/known/contents.arrow   sha256 of every image with labels, as four numbers, sorted
    state/known/earlier.arrow    item -> what a server said of it the last time, and the sha256 of its bytes

A run without them (every run of `classify`) knows nothing.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.fetch.source import Earlier, Source, Validator
from pipelines.storage.storage import Storage
from pipelines.storage.uris import is_local, local_path

CONTENTS = "known/contents.arrow"
EARLIER = "known/earlier.arrow"
WORDS = ("word0", "word1", "word2", "word3")
"""Columns of `CONTENTS`: the digest in four uint64, the first one searched."""


class Known:
    """Owns the mappings of one run's files; safe to use from several threads."""

    def __init__(self, state: Storage) -> None:
        contents, earlier = map_arrow(state, CONTENTS), map_arrow(state, EARLIER)
        self._digests = None if contents is None else Digests(contents)
        self._earlier = earlier if earlier is not None and earlier.num_rows else None
        self._items = None if self._earlier is None else to_numpy(self._earlier["item_id"])

    def knows(self, sha256: str) -> bool:
        """Whether an image of these bytes was labelled before."""
        return self._digests is not None and self._digests.find(sha256) is not None

    def put_earlier(self, sources: Sequence[Source], item_ids: Sequence[int]) -> list[Source]:
        """The sources of these items, each with what an earlier response said of it."""
        if self._earlier is None or self._items is None:
            return list(sources)
        places = np.searchsorted(self._items, item_ids)
        places[places == len(self._items)] = 0
        found = self._earlier.take(pa.array(places)).to_pylist()
        return [
            replace(source, earlier=_read_earlier(row)) if row["item_id"] == item_id else source
            for source, item_id, row in zip(sources, item_ids, found, strict=True)
        ]


def _read_earlier(row: dict[str, str]) -> Earlier:
    return Earlier(Validator(row["etag"], row["last_modified"]), row["sha256"])


class Digests:
    """Sorted sha256 digests in the columns `WORDS` of a table."""

    def __init__(self, table: pa.Table) -> None:
        self._words = [to_numpy(table[name]) for name in WORDS]

    def find(self, sha256: str) -> int | None:
        """The row of a digest, or None."""
        wanted = split_digest(sha256)
        at = int(np.searchsorted(self._words[0], wanted[0]))
        while at < len(self._words[0]) and self._words[0][at] == wanted[0]:
            if all(words[at] == word for words, word in zip(self._words, wanted, strict=True)):
                return at
            at += 1
        return None

    def find_all(self, sha256s: Sequence[str]) -> np.ndarray:
        """The row of each digest, -1 where there is none; int64 [n]."""
        wanted = np.frombuffer(bytes.fromhex("".join(sha256s)), ">u8").astype(np.uint64).reshape(-1, 4)
        if not len(self._words[0]):
            return np.full(len(wanted), -1)
        at = np.minimum(np.searchsorted(self._words[0], wanted[:, 0]), len(self._words[0]) - 1)
        same = np.all([self._words[n][at] == wanted[:, n] for n in range(4)], axis=0)
        for row in np.flatnonzero(~same).tolist():  # absent, or its first word is another digest's too
            found = self.find(sha256s[row])
            at[row] = -1 if found is None else found
        return at


def split_digest(sha256: str) -> tuple[np.uint64, ...]:
    """The digest's columns `WORDS`."""
    return tuple(np.uint64(int(sha256[start : start + 16], 16)) for start in range(0, 64, 16))


def map_arrow(state: Storage, path: str) -> pa.Table | None:
    """An Arrow file of the state folder, mapped into memory; None if there is none."""
    if not state.exists(path):
        return None
    if is_local(state.uri):
        return pa.ipc.open_file(pa.memory_map(str(local_path(state.uri) / path))).read_all()
    with tempfile.TemporaryDirectory(prefix="iab-vision-known-") as folder:
        local = Path(folder) / "known.arrow"
        local.write_bytes(state.read(path))
        return pa.ipc.open_file(pa.memory_map(str(local))).read_all()  # mapped also when it is unlinked


def to_numpy(column: pa.ChunkedArray) -> Any:
    """A column without nulls as one array; of a file of one batch it is the mapping itself."""
    if column.num_chunks == 1:
        return column.chunk(0).to_numpy(zero_copy_only=True)
    return column.to_numpy()
