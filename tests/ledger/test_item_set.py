"""Bits against Python's own sets."""

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
    rows = ItemSet(N)
    rows.add(added)
    rows.remove(removed)
    expected = plain(added) - plain(removed)
    assert len(rows) == len(expected)
    assert plain(rows.missing()) == set(range(N)) - expected
    assert plain(rows.present(asked)) == expected & plain(asked)
    assert plain(rows.absent(asked)) == plain(asked) - expected
    assert all((row in rows) == (row in expected) for row in range(N))
    assert rows.full == (len(expected) == N)


def test_missing_is_right_across_the_blocks_it_works_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.ledger.item_set.BLOCK", 16)
    rows = ItemSet(N)
    rows.add([(3, 5), (40, 41)])
    assert rows.missing() == [(0, 3), (5, 40), (41, N)]


def test_a_range_outside_the_plan_is_refused_and_changes_nothing() -> None:
    rows = ItemSet(10)
    with pytest.raises(IndexError, match="8 to 11"):
        rows.add([(8, 11)])
    assert len(rows) == 0


@given(st.sets(st.integers(0, N)))
def test_ranges_and_row_ids_are_inverse(rows: set[int]) -> None:
    ids = np.array(sorted(rows), np.int64)
    assert ids_of(ranges_of(ids)).tolist() == ids.tolist()
    assert ranges_of(ids) == join_adjacent(ranges_of(ids))


def test_repeated_finds_overlap_and_not_adjacency() -> None:
    assert not overlap([(5, 9), (0, 5)])
    assert overlap([(5, 9), (0, 6)])


def test_a_billion_rows_are_125_megabytes() -> None:
    assert ItemSet(10**9)._bits.nbytes == 125_000_000
