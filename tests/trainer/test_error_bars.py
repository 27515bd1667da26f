"""Error bars of eval losses: what they promise is what they keep, on losses that were made up to be known."""

import random
from collections.abc import Callable

import pytest

from trainer.error_bars import Each, between, difference, mean, standard_error
from trainer.page_tables import mean_of, number, percent

SAMPLES, BINS = 40, 7


def made_up(rng: random.Random, repetitions: int, own: float, noise: float) -> Each:
    """Losses that fall with t; `own` is how far samples differ among each other, `noise` what is left."""
    effects = [rng.gauss(0, own) for _ in range(SAMPLES)]
    count = SAMPLES * repetitions
    order = rng.sample(range(count), count)  # evenly spread over [0, 350), in any order
    each = {}
    for j, place in enumerate(order):
        t = place * 50 * BINS // count
        loss = 5 - t / 50 + effects[j % SAMPLES] + rng.gauss(0, noise)
        each[f"{j % SAMPLES:032x}", j // SAMPLES] = (t, loss)
    return each


def spread_and_promise(make: Callable[[random.Random], Each]) -> tuple[float, float]:
    """How far means of made-up evaluations really lie apart, and what their standard errors say of that; variances."""
    rng = random.Random(0)
    trials = [make(rng) for _ in range(400)]
    means = [mean(one) or 0.0 for one in trials]
    middle = sum(means) / len(means)
    promised = [standard_error([(1.0, one)]) or 0.0 for one in trials]
    return sum((m - middle) ** 2 for m in means) / len(means), sum(p * p for p in promised) / len(promised)


@pytest.mark.parametrize(("repetitions", "own", "noise"), [(1, 0.0, 1.0), (1, 1.0, 0.5), (6, 1.0, 0.5), (6, 0.0, 1.0)])
def test_a_standard_error_is_how_far_means_lie_apart(repetitions: int, own: float, noise: float) -> None:
    """With samples drawn several times too, where draws depend on each other; what t does to the loss is no chance."""
    spread, promise = spread_and_promise(lambda rng: made_up(rng, repetitions, own, noise))
    assert promise == pytest.approx(spread, rel=0.25)


def test_a_difference_of_the_same_draws_is_known_better() -> None:
    rng = random.Random(1)
    one = made_up(rng, 2, 1.0, 0.5)
    other = {key: (t, loss - 0.1 + rng.gauss(0, 0.01)) for key, (t, loss) in one.items()}
    change = difference(other, one)
    assert mean(change) == pytest.approx(-0.1, abs=0.01)
    error, alone = standard_error([(1.0, change)]), standard_error([(1.0, one)])
    assert error is not None
    assert alone is not None
    assert error < alone / 20


def test_a_part_that_is_drawn_once_a_stretch_is_not_certain() -> None:
    """Its draws differ from nothing, so the other part's error would be promised for both."""
    thin = {("a", n): (50 * n, 100.0 * n) for n in range(7)}
    dense = made_up(random.Random(3), 2, 1.0, 0.5)
    assert standard_error([(0.65, thin), (0.35, dense)]) is None
    assert standard_error([(0.35, thin), (0.65, dense)]) is not None
    assert standard_error([(1.0, thin)]) is None


def test_parts_of_the_schedule_share_their_samples() -> None:
    """The error of the whole is not that of two independent halves: what is hard for one is hard for the other."""
    halves = made_up(random.Random(2), 4, 1.0, 0.1)
    low, high = between(halves, 0, 200), between(halves, 200, 350)
    whole = standard_error([(4 / 7, low), (3 / 7, high)])
    assert whole == pytest.approx(standard_error([(1.0, halves)]), rel=0.1)
    apart = [standard_error([(share, half)]) or 0.0 for share, half in ((4 / 7, low), (3 / 7, high))]
    assert whole is not None
    assert whole > 1.2 * (apart[0] ** 2 + apart[1] ** 2) ** 0.5


def test_by_hand() -> None:
    each = {("a", 0): (0, 1.0), ("b", 0): (10, 3.0), ("c", 0): (20, 5.0)}
    assert standard_error([(1.0, each)]) == pytest.approx((4.0 / 3) ** 0.5)  # one stretch: variance 4, by three
    assert standard_error([(0.5, each)]) == pytest.approx(0.5 * (4.0 / 3) ** 0.5)


def test_too_few_draws_say_nothing() -> None:
    assert standard_error([(1.0, {})]) is None
    assert standard_error([(1.0, {("a", 0): (0, 1.0), ("a", 1): (3, 2.0)})]) is None  # one sample
    assert standard_error([(1.0, {("a", 0): (0, 1.0), ("b", 0): (60, 2.0)})]) is None  # one in each stretch
    assert mean({}) is None
    assert mean_of([]) == (None, None)
    assert mean_of([2.0, 3.0]) == (2.5, None)
    assert mean_of([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, pytest.approx(0.5**0.5))


def test_what_stands_in_a_cell() -> None:
    assert number(0.21344, 0.01) == "0.2134 <small>± 0.02</small>"
    assert number(0.2, None) == "0.2"
    assert percent(-0.01, 0.001, 0.2) == "-5.00 % <small>± 0.98</small>"
    assert percent(None, None, 0.2) == percent(0.1, 0.1, None) == "–"
