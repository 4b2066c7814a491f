"""A set of item ids out of 0 … n-1 as one bit each: a billion items are 125 MB. Pure arithmetic, no I/O.

Ranges are half-open pairs (start, stop), the one form in which item ids travel between steps.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

Range = tuple[int, int]

BLOCK = 1 << 23
"""Items unpacked at a time, a multiple of 8: bits become bytes, so this bounds the working memory."""
PAIRS_AT_ONCE = 4_096


class Ranges(Sequence[Range]):
    """Ranges in an array `bounds`, int64 [n, 2]: 16 bytes each, where a list of pairs takes 130."""

    __slots__ = ("bounds",)

    def __init__(self, ranges: Iterable[Range] | np.ndarray = ()) -> None:
        self.bounds: np.ndarray
        if isinstance(ranges, Ranges):
            self.bounds = ranges.bounds
        else:
            pairs = ranges if isinstance(ranges, np.ndarray) else np.array(list(ranges), np.int64)
            self.bounds = pairs.reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        found = self.bounds[index]
        return Ranges(found) if isinstance(index, slice) else tuple(found.tolist())

    def __iter__(self) -> Iterator[Range]:
        for at in range(0, len(self.bounds), PAIRS_AT_ONCE):
            yield from zip(*self.bounds[at : at + PAIRS_AT_ONCE].T.tolist(), strict=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and np.array_equal(self.bounds, Ranges(other).bounds)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"Ranges({list(self)})"


class ItemSet:
    """Bits of a fixed number of items; adding one twice is the same as once."""

    def __init__(self, n_items: int) -> None:
        self.n_items = n_items
        self._bits = np.zeros(-(-n_items // 8), np.uint8)

    def add(self, ranges: Iterable[Range]) -> None:
        """Add the items. Raises IndexError for a range outside 0 … n."""
        for first, chosen in self._windows(ranges):
            bits = self._bits[first : first + len(chosen) // 8]
            bits |= np.packbits(chosen, bitorder="little")

    def remove(self, ranges: Iterable[Range]) -> None:
        """Remove the items. Raises IndexError for a range outside 0 … n."""
        for first, chosen in self._windows(ranges):
            bits = self._bits[first : first + len(chosen) // 8]
            bits &= ~np.packbits(chosen, bitorder="little")

    def __len__(self) -> int:
        return int(np.bitwise_count(self._bits).sum())

    @property
    def full(self) -> bool:
        """Whether no item is missing."""
        return len(self) == self.n_items

    def present(self, ranges: Iterable[Range]) -> Ranges:
        """Which of these items are in the set, ascending."""
        return self._select(ranges, 1)

    def absent(self, ranges: Iterable[Range]) -> Ranges:
        """Which of these items are not in the set, ascending."""
        return self._select(ranges, 0)

    def missing(self) -> Ranges:
        """Every item that is not in the set."""
        return self.absent([(0, self.n_items)])

    def _select(self, ranges: Iterable[Range], value: int) -> Ranges:
        found = [Ranges()]
        for first, chosen in self._windows(ranges):
            window = np.unpackbits(self._bits[first : first + len(chosen) // 8], bitorder="little")
            hits = chosen & (window == value)
            found.append(Ranges(np.flatnonzero(np.diff(hits, prepend=False, append=False)) + first * 8))
        return join_adjacent(concat(found))

    def _windows(self, ranges: Iterable[Range]) -> Iterator[tuple[int, np.ndarray]]:
        """The items of the ranges a block at a time: their first byte, and a bool for each bit."""
        starts, stops = _union(self._check(Ranges(ranges))).bounds.T
        if not len(starts):
            return
        for block in range(int(starts[0]) // BLOCK * BLOCK, int(stops[-1]), BLOCK):
            here = slice(np.searchsorted(stops, block, "right"), np.searchsorted(starts, block + BLOCK))
            begin, end = np.maximum(starts[here], block), np.minimum(stops[here], block + BLOCK)
            if len(begin):
                first = int(begin[0]) // 8
                edges = np.zeros((int(end[-1]) + 7) // 8 * 8 - first * 8 + 1, np.int8)
                edges[begin - first * 8], edges[end - first * 8] = 1, -1
                yield first, np.cumsum(edges[:-1], dtype=np.int8).view(bool)

    def _check(self, ranges: Ranges) -> Ranges:
        starts, stops = ranges.bounds.T
        outside = np.flatnonzero((starts < 0) | (starts > stops) | (stops > self.n_items))
        if len(outside):
            start, stop = ranges[outside[0]]
            raise IndexError(f"items {start} to {stop} are not within the plan's {self.n_items}")
        return ranges


def ranges_of(item_ids: np.ndarray) -> Ranges:
    """The ranges of ascending, distinct item ids, int64 [n]."""
    breaks = np.flatnonzero(np.diff(item_ids, prepend=-2, append=-2) != 1)
    return Ranges(np.stack([item_ids[breaks[:-1]], item_ids[breaks[1:] - 1] + 1], axis=1))


def ids_of(ranges: Iterable[Range]) -> np.ndarray:
    """Every item id of the ranges in their order, int64 [n]."""
    starts, stops = Ranges(ranges).bounds.T
    lengths = stops - starts
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())


def count(ranges: Iterable[Range]) -> int:
    """How many items the ranges hold."""
    starts, stops = Ranges(ranges).bounds.T
    return int((stops - starts).sum())


def concat(several: Iterable[Iterable[Range]]) -> Ranges:
    """The ranges of several sequences, one after the other."""
    return Ranges(np.concatenate([Ranges().bounds, *(Ranges(ranges).bounds for ranges in several)]))


def overlap(ranges: Iterable[Range]) -> bool:
    """Whether any item is in two of the ranges."""
    bounds = Ranges(ranges).bounds
    starts, stops = bounds[np.lexsort(bounds.T[::-1])].T
    return bool((stops[:-1] > starts[1:]).any())


def join_adjacent(ranges: Iterable[Range]) -> Ranges:
    """The same items with neighbouring ranges joined, order kept."""
    starts, stops = Ranges(ranges).bounds.T
    return _join(starts, stops, starts[1:] != stops[:-1])


def _union(ranges: Ranges) -> Ranges:
    """The same items in ascending ranges, none of which is empty or touches another."""
    starts, stops = ranges.bounds[ranges.bounds[:, 0] < ranges.bounds[:, 1]].T
    order = np.argsort(starts, kind="stable")
    starts, stops = starts[order], np.maximum.accumulate(stops[order])
    return _join(starts, stops, starts[1:] > stops[:-1])


def _join(starts: np.ndarray, stops: np.ndarray, apart: np.ndarray) -> Ranges:
    """The ranges with each joined to the one before it, unless `apart`, bool [n - 1], says otherwise."""
    edge = [True] if len(starts) else []
    first, last = np.concatenate([edge, apart]).astype(bool), np.concatenate([apart, edge]).astype(bool)
    return Ranges(np.stack([starts[first], stops[last]], axis=1))
