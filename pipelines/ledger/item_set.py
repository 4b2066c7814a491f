"""A set of item ids out of 0 … n-1 as one bit each: a billion items are 125 MB. Pure arithmetic, no I/O.

Ranges are half-open pairs (start, stop), the one form in which item ids travel between steps.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np

Range = tuple[int, int]

BLOCK = 1 << 23
"""Items unpacked at a time: eight bits become eight bytes, so this bounds the working memory to 8 MiB."""


class ItemSet:
    """Bits of a fixed number of items; adding one twice is the same as once."""

    def __init__(self, n_items: int) -> None:
        self.n_items = n_items
        self._bits = np.zeros(-(-n_items // 8), np.uint8)

    def add(self, ranges: Iterable[Range]) -> None:
        """Add the items. Raises IndexError for a range outside 0 … n."""
        self._write(ranges, 1)

    def remove(self, ranges: Iterable[Range]) -> None:
        """Remove the items. Raises IndexError for a range outside 0 … n."""
        self._write(ranges, 0)

    def __len__(self) -> int:
        return int(np.bitwise_count(self._bits).sum())

    @property
    def full(self) -> bool:
        """Whether no item is missing."""
        return len(self) == self.n_items

    def present(self, ranges: Iterable[Range]) -> list[Range]:
        """Which of these items are in the set."""
        return self._select(ranges, 1)

    def absent(self, ranges: Iterable[Range]) -> list[Range]:
        """Which of these items are not in the set."""
        return self._select(ranges, 0)

    def missing(self) -> list[Range]:
        """Every item that is not in the set."""
        return self.absent([(0, self.n_items)])

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
            first = start // 8
            window = np.unpackbits(self._bits[first : -(-stop // 8)], bitorder="little")
            chosen = window[start - first * 8 : stop - first * 8] == value
            edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False)) + start
            found.extend(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
        return join_adjacent(found)

    def _blocks(self, ranges: Iterable[Range]) -> Iterator[Range]:
        for start, stop in ranges:
            if not 0 <= start <= stop <= self.n_items:
                raise IndexError(f"items {start} to {stop} are not within the plan's {self.n_items}")
            for block in range(start, stop, BLOCK):
                yield block, min(stop, block + BLOCK)


def ranges_of(item_ids: np.ndarray) -> list[Range]:
    """The ranges of ascending, distinct item ids, int64 [n]."""
    if not len(item_ids):
        return []
    breaks = np.flatnonzero(np.diff(item_ids) != 1) + 1
    starts = item_ids[np.concatenate([[0], breaks])]
    stops = item_ids[np.concatenate([breaks, [len(item_ids)]]) - 1] + 1
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def ids_of(ranges: Sequence[Range]) -> np.ndarray:
    """Every item id of the ranges in their order, int64 [n]."""
    return np.concatenate([np.empty(0, np.int64), *(np.arange(start, stop) for start, stop in ranges)])


def count(ranges: Iterable[Range]) -> int:
    """How many items the ranges hold."""
    return sum(stop - start for start, stop in ranges)


def overlap(ranges: Sequence[Range]) -> bool:
    """Whether any item is in two of the ranges."""
    ordered = sorted(ranges)
    return any(earlier[1] > later[0] for earlier, later in pairwise(ordered))


def join_adjacent(ranges: Iterable[Range]) -> list[Range]:
    """The same items with neighbouring ranges joined, order kept."""
    joined: list[Range] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined
