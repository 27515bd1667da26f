"""Sets of keys as sorted arrays: the same as Python's own sets, whatever bytes a key is made of."""

from hypothesis import given
from hypothesis import strategies as st

from cache_builder.key_arrays import as_keys, each, is_in
from cache_builder.named import union

FEW = st.sampled_from([b"\0", b"\1", b"\xff"])  # keys that end in zeros, or differ in their last byte alone
KEYS = st.lists(st.lists(FEW, min_size=16, max_size=16).map(b"".join) | st.binary(min_size=16, max_size=16))


@given(KEYS, KEYS)
def test_membership_and_union_are_those_of_sets(one: list[bytes], other: list[bytes]) -> None:
    known = union([as_keys(other)])
    assert list(each(known)) == sorted(set(other))
    assert is_in(as_keys(one), known).tolist() == [key in set(other) for key in one]
    assert list(each(union([as_keys(one), as_keys(other)]))) == sorted({*one, *other})


def test_of_nothing_there_is_nothing() -> None:
    assert len(union([])) == 0
    assert is_in(as_keys([bytes(16)]), union([])).tolist() == [False]
