"""A set of row ids out of 0 … n-1 as one bit each: a billion rows are 125 MB. Pure arithmetic, no I/O.

Ranges are half-open pairs (start, stop), the one form in which row ids travel between steps.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np

Range = tuple[int, int]

BLOCK = 1 << 23
"""Rows unpacked at a time: eight bits become eight bytes, so this bounds the working memory to 8 MiB."""


class RowSet:
    """Bits of a fixed number of rows; adding a row twice is the same as once."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows
        self._bits = np.zeros(-(-n_rows // 8), np.uint8)

    def copy(self) -> "RowSet":
        """An independent set of the same rows."""
        twin = RowSet(self.n_rows)
        twin._bits = self._bits.copy()
        return twin

    def add(self, ranges: Iterable[Range]) -> None:
        """Put the rows in. Raises IndexError for a range outside 0 … n."""
        self._write(ranges, 1)

    def remove(self, ranges: Iterable[Range]) -> None:
        """Take the rows out. Raises IndexError for a range outside 0 … n."""
        self._write(ranges, 0)

    def __len__(self) -> int:
        return int(np.bitwise_count(self._bits).sum())

    def __contains__(self, row_id: int) -> bool:
        return bool(self._unpacked(row_id, row_id + 1)[0])

    @property
    def full(self) -> bool:
        """Whether no row is missing."""
        return len(self) == self.n_rows

    def present(self, ranges: Iterable[Range]) -> list[Range]:
        """Which of these rows are in the set."""
        return self._select(ranges, 1)

    def absent(self, ranges: Iterable[Range]) -> list[Range]:
        """Which of these rows are not in the set."""
        return self._select(ranges, 0)

    def missing(self) -> list[Range]:
        """Every row that is not in the set."""
        return self.absent([(0, self.n_rows)])

    def _write(self, ranges: Iterable[Range], value: int) -> None:
        for start, stop in self._blocks(ranges):
            first = start // 8
            bits = self._bits[first : -(-stop // 8)]
            window = np.unpackbits(bits, bitorder="little")
            window[start - first * 8 : stop - first * 8] = value
            bits[:] = np.packbits(window, bitorder="little")

    def _select(self, ranges: Iterable[Range], value: int) -> list[Range]:
        found: list[Range] = []
        for start, stop in self._blocks(ranges):
            edges = (
                np.flatnonzero(np.diff(self._unpacked(start, stop) == value, prepend=False, append=False))
                + start
            )
            found.extend(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
        return merged(found)

    def _unpacked(self, start: int, stop: int) -> np.ndarray:
        first = start // 8
        window = np.unpackbits(self._bits[first : -(-stop // 8)], bitorder="little")
        return window[start - first * 8 : stop - first * 8]

    def _blocks(self, ranges: Iterable[Range]) -> Iterator[Range]:
        for start, stop in ranges:
            if not 0 <= start <= stop <= self.n_rows:
                raise IndexError(f"rows {start} to {stop} are not within the plan's {self.n_rows}")
            for block in range(start, stop, BLOCK):
                yield block, min(stop, block + BLOCK)


def ranges_of(row_ids: np.ndarray) -> list[Range]:
    """The ranges of ascending, distinct row ids, int64 [n]."""
    if not len(row_ids):
        return []
    breaks = np.flatnonzero(np.diff(row_ids) != 1) + 1
    starts = row_ids[np.concatenate([[0], breaks])]
    stops = row_ids[np.concatenate([breaks, [len(row_ids)]]) - 1] + 1
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def row_ids_of(ranges: Sequence[Range]) -> np.ndarray:
    """Every row id of the ranges in their order, int64 [n]."""
    return np.concatenate([np.empty(0, np.int64), *(np.arange(start, stop) for start, stop in ranges)])


def count(ranges: Iterable[Range]) -> int:
    """How many rows the ranges hold."""
    return sum(stop - start for start, stop in ranges)


def repeated(ranges: Sequence[Range]) -> bool:
    """Whether any row is in two of the ranges."""
    ordered = sorted(ranges)
    return any(earlier[1] > later[0] for earlier, later in pairwise(ordered))


def merged(ranges: Iterable[Range]) -> list[Range]:
    """The same rows with neighbouring ranges joined, order kept."""
    joined: list[Range] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined
