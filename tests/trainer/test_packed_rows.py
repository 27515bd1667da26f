"""Packed rows are what an array of them is."""

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.packed_rows import STRETCH, PackedRows, row_after

Rows = st.sets(st.integers(0, 5 * STRETCH), min_size=1, max_size=60)


@given(Rows, st.data())
def test_they_are_an_array(rows: set[int], data: Any) -> None:
    array = np.array(sorted(rows))
    packed = PackedRows(array)
    items = data.draw(st.lists(st.integers(0, len(array) - 1)))
    assert len(packed) == len(array)
    assert list(packed) == array.tolist()
    assert packed[np.array(items, np.int32)].tolist() == array[items].tolist()


@given(Rows)
def test_after_each_comes_the_next_and_after_the_last_the_first(rows: set[int]) -> None:
    array = np.array(sorted(rows))
    for row, following in zip(array, np.roll(array, -1), strict=True):
        assert row_after(PackedRows(array), int(row)) == row_after(np.repeat(array, 2), int(row)) == following


def test_a_row_takes_little_more_than_a_bit() -> None:
    packed = PackedRows(np.flatnonzero(np.arange(1_000_000) % 50))
    assert packed._bits.nbytes + packed._before.nbytes + packed._stretches.nbytes < 1_000_000 / 7
