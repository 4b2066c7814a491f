"""Bits against Python's own sets."""

import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.ledger.item_set import ItemSet, ids_of, join_adjacent, overlap, ranges_of

N = 100
RANGES = st.lists(
    st.tuples(st.integers(0, N), st.integers(0, N)).map(lambda pair: (min(pair), max(pair))), max_size=5
)


def plain(ranges: list[tuple[int, int]]) -> set[int]:
    return {row for start, stop in ranges for row in range(start, stop)}


@given(RANGES, RANGES, RANGES)
def test_add_and_remove_agree_with_a_python_set(
    added: list[tuple[int, int]], removed: list[tuple[int, int]], asked: list[tuple[int, int]]
) -> None:
    items = ItemSet(N)
    items.add(added)
    items.remove(removed)
    expected = plain(added) - plain(removed)
    assert len(items) == len(expected)
    assert plain(items.missing()) == set(range(N)) - expected
    assert plain(items.present(asked)) == expected & plain(asked)
    assert plain(items.absent(asked)) == plain(asked) - expected
    assert items.full == (len(expected) == N)


def test_missing_is_right_across_the_blocks_it_works_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.ledger.item_set.BLOCK", 16)
    items = ItemSet(N)
    items.add([(3, 5), (40, 41)])
    assert items.missing() == [(0, 3), (5, 40), (41, N)]


def test_a_range_outside_the_plan_is_refused_and_changes_nothing() -> None:
    items = ItemSet(10)
    with pytest.raises(IndexError, match="8 to 11"):
        items.add([(8, 11)])
    assert len(items) == 0


@given(st.sets(st.integers(0, N)))
def test_ranges_and_row_ids_are_inverse(items: set[int]) -> None:
    ids = np.array(sorted(items), np.int64)
    assert ids_of(ranges_of(ids)).tolist() == ids.tolist()
    assert ranges_of(ids) == join_adjacent(ranges_of(ids))


def test_repeated_finds_overlap_and_not_adjacency() -> None:
    assert not overlap([(5, 9), (0, 5)])
    assert overlap([(5, 9), (0, 6)])


def test_a_billion_rows_are_125_megabytes() -> None:
    assert ItemSet(10**9)._bits.nbytes == 125_000_000


def test_scattered_items_cost_sixteen_bytes_each() -> None:
    """A pass that defers one image in ten leaves a range for each: of ten million, a million."""
    items = ItemSet(2_000_000)
    scattered = ranges_of(np.arange(0, 2_000_000, 10))
    tracemalloc.start()
    try:
        items.add(scattered)
        missing = items.missing()
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(missing) == 200_000
    assert used <= 20 * len(missing)
    assert missing[:2] == [(1, 10), (11, 20)]
    assert list(missing)[-1] == missing[-1] == (1_999_991, 2_000_000)


def test_ranges_survive_pickling_and_compare_by_value() -> None:
    ranges = ranges_of(np.array([3, 4, 9]))
    assert pickle.loads(pickle.dumps(ranges)) == ranges == [(3, 5), (9, 10)]
    assert ranges != [(3, 5)]
    assert repr(ranges) == "Ranges([(3, 5), (9, 10)])"
