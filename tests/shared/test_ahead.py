"""Steps that work side by side: order, bounds, errors, and an end that leaves no thread behind."""

import threading
import time
from collections.abc import Iterator

import pytest

from shared.ahead import Ahead, Dealt


def until(condition: object, limit_s: float = 10) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end_s
        time.sleep(0.001)


def noting(made: list[int]) -> Iterator[int]:
    """A hundred numbers, each noted when it is made."""
    for number in range(100):
        made.append(number)
        yield number


def test_results_come_in_order_and_the_threads_end() -> None:
    before = threading.active_count()
    with Ahead(range(1000), count=3) as ahead:
        assert list(ahead) == list(range(1000))
        assert list(ahead) == []
    assert threading.active_count() == before


def test_no_more_is_made_than_was_asked_for() -> None:
    made: list[int] = []
    with Ahead(noting(made), count=4) as ahead:
        until(lambda: len(made) == 4)
        time.sleep(0.05)
        assert len(made) == 4
        for taken in range(1, 20):
            next(ahead)
            until(lambda taken=taken: len(made) == taken + 4)
    assert len(made) < 30


def test_an_error_comes_after_what_was_made_before_it() -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyboardInterrupt("here")

    with Ahead(source(), count=8) as ahead:
        assert [next(ahead), next(ahead)] == [1, 2]
        with pytest.raises(KeyboardInterrupt):
            next(ahead)
        with pytest.raises(StopIteration):
            next(ahead)


def test_an_early_end_closes_its_sources_in_their_threads() -> None:
    begun, closed = threading.Barrier(2), []

    def source() -> Iterator[int]:
        try:
            begun.wait(10)
            while True:
                yield 1
        finally:
            closed.append(threading.current_thread().name)

    with Ahead(source(), source(), count=2) as ahead:
        assert next(ahead) == 1
    assert len(set(closed)) == 2
    assert threading.current_thread().name not in closed


def test_several_sources_and_several_takers_lose_nothing_and_repeat_nothing() -> None:
    numbers = [range(start, 3000, 3) for start in range(3)]
    with Ahead(*numbers, count=4) as shared, Ahead(*(map(int, shared) for _ in range(4)), count=2) as ahead:
        assert sorted(ahead) == list(range(3000))


def test_an_error_in_one_source_ends_the_others() -> None:
    def endless() -> Iterator[int]:
        while True:
            yield 1

    def failing() -> Iterator[int]:
        yield 2
        raise ValueError("one of two")

    with pytest.raises(ValueError, match="one of two"), Ahead(endless(), failing(), count=2) as ahead:
        for _ in ahead:
            pass


def test_a_source_rests_until_few_are_left_and_then_makes_all_at_a_stretch() -> None:
    made: list[int] = []
    with Ahead(noting(made), count=5, again_at=2) as ahead:
        until(lambda: len(made) == 5)
        for taken in (1, 2):
            next(ahead)
            time.sleep(0.05)
            assert len(made) == 5, taken
        next(ahead)
        until(lambda: len(made) == 8)
        time.sleep(0.05)
        assert len(made) == 8
        assert list(ahead) == list(range(3, 100))


@pytest.mark.parametrize("again_at", [0, 1, 3])
def test_resting_loses_no_wake_up(again_at: int) -> None:
    numbers = [range(start, 3000, 3) for start in range(3)]
    with (
        Ahead(*numbers, count=4, again_at=again_at) as shared,
        Ahead(*(map(int, shared) for _ in range(4)), count=4, again_at=again_at) as ahead,
    ):
        assert sorted(ahead) == list(range(3000))


def test_what_is_dealt_goes_to_one_taker_each() -> None:
    def slowly() -> Iterator[int]:  # a generator, which no two threads may run at once
        for number in range(50):
            time.sleep(0.001)
            yield number

    dealt = Dealt(slowly())
    with Ahead(*(map(int, dealt) for _ in range(4)), count=2) as ahead:
        assert sorted(ahead) == list(range(50))
    assert list(dealt) == []
