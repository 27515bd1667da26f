"""Parts of a manifest: stretches of sample ids that divide it without gap or overlap, whatever their number."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError
from shared.parts import MOST_PARTS, Part, covers, in_any, joined_parts, parse_part

HEADS = np.random.default_rng(0).integers(0, 2**32, 2000, np.uint64).astype(np.uint32)
ENDS = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], np.uint32)

parts = st.integers(1, 24).flatmap(lambda count: st.builds(Part, st.integers(0, count - 1), st.just(count)))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, MOST_PARTS])
def test_every_sample_belongs_to_one_part(count: int) -> None:
    heads = np.concatenate([HEADS[:200], ENDS])
    index = heads.astype(object) * count // 2**32
    for part in {0, count // 2, count - 1}:
        assert (Part(part, count).holds(heads) == (index == part)).all()
    if count <= 64:
        assert (sum(Part(i, count).holds(heads).astype(int) for i in range(count)) == 1).all()


@given(st.lists(parts, max_size=5), parts)
def test_covering_is_what_it_says(some: list[Part], wanted: Part) -> None:
    grid = (np.arange(24 * 23 * 22 * 20, dtype=np.uint64) * np.uint64(2**32) // np.uint64(24 * 23 * 22 * 20)).astype(
        np.uint32
    )[::7]
    missing = wanted.holds(grid) & ~in_any(some, grid)
    if covers(some, wanted):
        assert not missing.any()
    joined = joined_parts(some)
    if joined:
        assert (in_any(joined, grid) == in_any(some, grid)).all()
        assert set(joined) <= set(some)
        assert not any(covers([other for other in joined if other != part], part) for part in joined)
    else:
        assert not some or in_any(some, grid).all()


def test_parts_nest() -> None:
    assert covers([Part(0, 2)], Part(1, 4))
    assert covers([Part(0, 4), Part(1, 4)], Part(0, 2))
    assert not covers([Part(0, 4)], Part(0, 2))
    assert not covers([], Part(0, 1))
    assert joined_parts([Part(1, 3), Part(0, 3), Part(2, 3)]) == ()
    assert joined_parts([Part(0, 4), Part(0, 2), Part(1, 8)]) == (Part(0, 2),)


@pytest.mark.parametrize(
    "text", ["", "1", "1/", "/2", "-1/2", "2/2", "0/0", "1/2/3", "a/b", "0/65537", "0.5/2", "٠/٢x"]
)
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="part"):
        parse_part(text)
    assert parse_part(" 1/2 ") == Part(1, 2)
