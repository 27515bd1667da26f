"""The page of maths against diffusers' schedulers, and the draw of timesteps against what it promises."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shared.errors import ConfigError, ContractError
from shared.schedule import (
    STRATUM_BITS,
    NoiseSchedule,
    PredictionType,
    TimestepRange,
    check_objective,
    check_partition,
    linear_betas,
    sample_timesteps,
    scaled_linear_betas,
    stratify,
)

T = 1000
SDXL = {"num_train_timesteps": T, "beta_start": 0.00085, "beta_end": 0.012}
BASE, REFINER = TimestepRange(350, T), TimestepRange(0, 350)
EVERY_T = torch.arange(T)
LARGEST_DRAW = (1 << STRATUM_BITS) - 1


def sdxl_schedule(zero_terminal_snr: bool = False) -> NoiseSchedule:
    return NoiseSchedule(scaled_linear_betas(T, 0.00085, 0.012), zero_terminal_snr=zero_terminal_snr)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the forward process ---


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
def test_tables_are_those_of_ddpm_and_ddim(kind: str, zero_terminal_snr: bool) -> None:
    betas = {"scaled_linear": scaled_linear_betas, "linear": linear_betas}[kind](T, 0.00085, 0.012)
    ours = NoiseSchedule(betas, zero_terminal_snr=zero_terminal_snr)
    for scheduler_class in (DDPMScheduler, DDIMScheduler):
        theirs = scheduler_class(**SDXL, beta_schedule=kind, rescale_betas_zero_snr=zero_terminal_snr)
        torch.testing.assert_close(ours.abar.float(), theirs.alphas_cumprod, rtol=0, atol=1e-6)
        assert (float(theirs.alphas_cumprod[-1]) == 0) == zero_terminal_snr
    assert (float(ours.abar[-1]) == 0) == zero_terminal_snr


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("scheduler_class", [EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_tables_are_those_of_euler_and_unipc(scheduler_class: type, zero_terminal_snr: bool) -> None:
    theirs = scheduler_class(**SDXL, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero_terminal_snr)
    abar = sdxl_schedule(zero_terminal_snr).abar.float()
    if zero_terminal_snr:  # these divide by alpha, so they end just above zero
        assert float(theirs.alphas_cumprod[-1]) == 2**-24
        assert float(abar[-1]) == 0
    torch.testing.assert_close(abar, theirs.alphas_cumprod, rtol=0, atol=1e-6)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_noising_and_velocity_are_diffusers(zero_terminal_snr: bool) -> None:
    ours = sdxl_schedule(zero_terminal_snr)
    theirs = DDPMScheduler(**SDXL, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero_terminal_snr)
    x_0, eps = torch.randn(2, T, 4, 2, 3, generator=generator())
    torch.testing.assert_close(
        ours.add_noise(x_0, eps, EVERY_T), theirs.add_noise(x_0, eps, EVERY_T), rtol=0, atol=5e-6
    )
    velocity = ours.target("v_prediction", x_0, eps, EVERY_T)
    torch.testing.assert_close(velocity, theirs.get_velocity(x_0, eps, EVERY_T), rtol=0, atol=5e-6)
    assert ours.target("epsilon", x_0, eps, EVERY_T) is eps
    assert ours.target("sample", x_0, eps, EVERY_T) is x_0


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_velocity_gives_back_picture_and_noise(zero_terminal_snr: bool) -> None:
    schedule = sdxl_schedule(zero_terminal_snr)
    x_0, eps = torch.randn(2, T, 4, 2, 2, generator=generator())
    x_t = schedule.add_noise(x_0, eps, EVERY_T)
    v = schedule.target("v_prediction", x_0, eps, EVERY_T)
    alpha, sigma = (table(EVERY_T).view(-1, 1, 1, 1) for table in (schedule.alpha, schedule.sigma))
    torch.testing.assert_close(alpha * x_t - sigma * v, x_0, rtol=0, atol=1e-5)
    torch.testing.assert_close(sigma * x_t + alpha * v, eps, rtol=0, atol=1e-5)


def test_zero_terminal_rescale_keeps_the_first_and_ends_in_pure_noise() -> None:
    plain, rescaled = sdxl_schedule(), sdxl_schedule(True)
    assert float(rescaled.abar[0]) == pytest.approx(float(plain.abar[0]), rel=1e-15)
    assert bool((rescaled.abar.diff() < 0).all())
    last = torch.tensor([T - 1])
    x_0, eps = torch.randn(2, 1, 4, 2, 2, generator=generator())
    assert torch.equal(rescaled.add_noise(x_0, eps, last), eps)
    assert torch.equal(rescaled.target("v_prediction", x_0, eps, last), -x_0)
    assert float(rescaled.snr(last)) == 0


def test_snr_at_known_timesteps() -> None:
    plain, rescaled = sdxl_schedule(), sdxl_schedule(True)
    assert float(plain.snr(torch.tensor(349))) == pytest.approx(1.033, abs=5e-4)
    assert float(rescaled.snr(torch.tensor(349))) == pytest.approx(0.918, abs=5e-4)
    for schedule, t in ((plain, 147), (rescaled, 139)):
        snr = schedule.snr(EVERY_T)
        assert bool((snr.diff() <= 0).all())
        assert abs(int((snr > 5).sum()) - t) <= 1


def test_tables_stay_single_precision_whatever_the_batch_is() -> None:
    schedule = sdxl_schedule()
    t = torch.tensor([43, 999])  # bf16 cannot tell 999 from 1000
    half = torch.randn(2, 4, 2, 2, generator=generator()).bfloat16()
    assert schedule.add_noise(half, half, t).dtype == torch.float32
    exact = schedule.abar[t].sqrt()
    torch.testing.assert_close(schedule.alpha(t).double(), exact, rtol=1e-7, atol=0)


# --- weights ---


def weight_by_hand(prediction_type: PredictionType, gamma: float, snr: float) -> float:
    if prediction_type == "sample":
        return min(snr, gamma)
    if prediction_type == "v_prediction":
        return min(snr, gamma) / (snr + 1)
    return min(snr, gamma) / snr if snr > 0 else 1.0


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 5.0, 20.0])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_min_snr_weight(prediction_type: PredictionType, gamma: float, zero_terminal_snr: bool) -> None:
    schedule = sdxl_schedule(zero_terminal_snr)
    weights = schedule.min_snr_weight(prediction_type, gamma, EVERY_T)
    snr = (schedule.abar / (1 - schedule.abar)).tolist()
    expected = torch.tensor([weight_by_hand(prediction_type, gamma, ratio) for ratio in snr])
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-9)
    assert bool(weights.isfinite().all())


def test_gamma_5_changes_nothing_for_an_epsilon_base_and_bites_the_refiner() -> None:
    weights = sdxl_schedule().min_snr_weight("epsilon", 5.0, EVERY_T)
    assert bool((weights[350:] == 1).all())
    assert abs(int((weights < 1).sum()) - 147) <= 1


def test_gamma_5_silences_high_noise_for_v_with_zero_terminal_snr() -> None:
    weights = sdxl_schedule(True).min_snr_weight("v_prediction", 5.0, EVERY_T)
    assert float(weights[700]) == pytest.approx(0.055, abs=1e-3)
    assert float(weights[900]) == pytest.approx(0.003, abs=1e-3)
    assert float(weights[999]) == 0
    assert float(weights[350:].mean()) == pytest.approx(0.13, abs=5e-3)
    assert float(weights[:350].mean()) == pytest.approx(0.55, abs=5e-3)


def test_epsilon_is_refused_where_the_snr_reaches_zero() -> None:
    with pytest.raises(ConfigError, match="epsilon"):
        check_objective("epsilon", True)
    for prediction_type in ("v_prediction", "sample"):
        check_objective(prediction_type, True)
    check_objective("epsilon", False)


# --- the draw of timesteps ---


@st.composite
def ranges(draw: st.DrawFn, most: int = T) -> TimestepRange:
    low = draw(st.integers(0, most - 1))
    return TimestepRange(low, draw(st.integers(low + 1, most)))


@given(ranges(), st.integers(0, 3000), st.integers(0, 2**32))
def test_drawn_timesteps_lie_in_the_range(within: TimestepRange, count: int, seed: int) -> None:
    t = sample_timesteps(within, count, generator(seed))
    assert t.dtype == torch.int64
    assert t.shape == (count,)
    assert all(int(value) in within for value in t)


@given(ranges(), st.integers(1, 300), st.integers(0, 2**32))
def test_each_stratum_is_hit_once(within: TimestepRange, count: int, seed: int) -> None:
    """Sorted, the i-th draw lies between the ends of the i-th of `count` equal parts, in exact integers."""
    t = sample_timesteps(within, count, generator(seed)).sort().values
    for i, value in enumerate((t - within.low).tolist()):
        first = len(within) * i // count
        last = -(-len(within) * (i + 1) // count) - 1
        assert first <= value <= last


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 350, 351, 650, 1000, 1024, 4096, 1_000_000])
@pytest.mark.parametrize("within", [BASE, REFINER, TimestepRange(0, T), TimestepRange(999, T)], ids=str)
def test_the_largest_and_the_smallest_draw_stay_inside(within: TimestepRange, count: int) -> None:
    largest = stratify(within, torch.full((count,), LARGEST_DRAW))
    smallest = stratify(within, torch.zeros(count, dtype=torch.int64))
    i = np.arange(count, dtype=object)  # Python's integers, which do not overflow
    n, one = len(within), 1 << STRATUM_BITS
    expected = within.low + (n * (i * one + LARGEST_DRAW)) // (count * one)
    assert np.array_equal(largest.numpy(), expected.astype(np.int64))
    assert int(largest[-1]) == within.high - 1
    assert int(smallest[0]) == within.low
    assert int(smallest.min()) >= within.low
    assert bool((smallest <= largest).all())


@pytest.mark.parametrize("within", [TimestepRange(3, 10), TimestepRange(0, 1), TimestepRange(350, 353)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5, 7, 16])
def test_every_timestep_is_reached_at_every_batch_size(within: TimestepRange, count: int) -> None:
    source = generator(1)
    seen = torch.cat([sample_timesteps(within, count, source) for _ in range(400 // count + 60)])
    assert seen.unique().tolist() == list(range(within.low, within.high))


def test_more_samples_than_timesteps_cover_all_of_them_at_once() -> None:
    assert sample_timesteps(REFINER, 700, generator()).unique().tolist() == list(range(350))


def chi_square_limit(degrees: int) -> float:
    """About the 1 - 1e-6 quantile (Wilson and Hilferty 1931)."""
    return degrees * (1 - 2 / (9 * degrees) + 4.75 * math.sqrt(2 / (9 * degrees))) ** 3


def chi_square(values: Tensor, cells: int) -> float:
    counts = torch.bincount(values, minlength=cells).double()
    expected = values.numel() / cells
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("count", [1, 3, 8, 48])
def test_timesteps_are_uniform_over_many_steps_and_at_each_position(count: int) -> None:
    within = TimestepRange(350, 374)
    source = generator(7)
    steps = torch.stack([sample_timesteps(within, count, source) for _ in range(6000)]) - within.low  # [steps, count]
    n = len(within)
    assert chi_square(steps.flatten(), n) < chi_square_limit(n - 1)
    for position in {0, count // 2, count - 1}:  # the permutation leaves no position with a stratum of its own
        assert chi_square(steps[:, position], n) < chi_square_limit(n - 1)


def test_wide_range_is_uniform_at_batch_size_one() -> None:
    source = generator(3)
    t = torch.cat([sample_timesteps(BASE, 1, source) for _ in range(20_000)])
    assert chi_square(t - BASE.low, len(BASE)) < chi_square_limit(len(BASE) - 1)


def test_strata_spread_a_batch_better_than_independent_draws() -> None:
    source = generator(5)
    means = torch.stack([sample_timesteps(BASE, 16, source).double().mean() for _ in range(500)])
    independent = len(BASE) / math.sqrt(12 * 16)
    assert float(means.std()) < independent / 8
    assert float(means.mean()) == pytest.approx((BASE.low + BASE.high - 1) / 2, abs=1)


def test_draws_are_a_function_of_the_generator() -> None:
    draws = [sample_timesteps(BASE, 24, generator(seed)).tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


# --- ranges ---


@given(st.integers(1, T - 1), st.integers(1, 64), st.integers(0, 2**32))
def test_two_experts_are_disjoint_and_complete_for_any_boundary(boundary: int, count: int, seed: int) -> None:
    low, high = TimestepRange(0, boundary), TimestepRange(boundary, T)
    check_partition([high, low], T)
    assert len(low) + len(high) == T
    low_t, high_t = (set(sample_timesteps(part, count, generator(seed)).tolist()) for part in (low, high))
    assert max(low_t) < boundary <= min(high_t)


@given(st.sets(st.integers(1, T - 1), max_size=6), st.randoms(use_true_random=False))
def test_any_cuts_tile_and_each_timestep_has_one_expert(cuts: set[int], order: random.Random) -> None:
    edges = [0, *sorted(cuts), T]
    parts = [TimestepRange(*pair) for pair in pairwise(edges)]
    order.shuffle(parts)
    check_partition(parts, T)
    for t in [0, T - 1, *cuts, *(cut - 1 for cut in cuts), *(cut - 0.5 for cut in cuts)]:
        assert sum(t in part for part in parts) == 1


def test_a_float_timestep_belongs_to_the_expert_below_the_border() -> None:
    """Schedulers with Karras sigmas give t between integers."""
    assert 349.999 in REFINER
    assert 349.999 not in BASE
    assert 350.0 in BASE
    assert 350.0 not in REFINER
    assert 999.5 in BASE
    assert 1000.0 not in BASE
    assert -0.001 not in REFINER
    assert float("nan") not in REFINER


@pytest.mark.parametrize(
    ("edges", "fault"),
    [
        ([(0, 350), (351, 1000)], r"no expert answers for timesteps \[350, 351\)"),
        ([(0, 351), (350, 1000)], r"two experts answer for timesteps \[350, 351\)"),
        ([(0, 1000), (350, 1000)], r"two experts answer for timesteps \[350, 1000\)"),
        ([(0, 1000), (350, 400)], r"two experts answer for timesteps \[350, 400\)"),
        ([(1, 350), (350, 1000)], r"no expert answers for timesteps \[0, 1\)"),
        ([(0, 350), (350, 999)], r"no expert answers for timesteps \[999, 1000\)"),
        ([(0, 350), (350, 1001)], r"timesteps \[1000, 1001\) are beyond"),
        ([(0, 200), (500, 1000), (200, 400)], r"no expert answers for timesteps \[400, 500\)"),
        ([], r"no expert answers for timesteps \[0, 1000\)"),
    ],
)
def test_faulty_partitions_are_named(edges: list[tuple[int, int]], fault: str) -> None:
    with pytest.raises(ContractError, match=fault):
        check_partition([TimestepRange(*pair) for pair in edges], T)


def test_three_experts_in_any_order_are_fine() -> None:
    check_partition([TimestepRange(700, T), TimestepRange(0, 200), TimestepRange(200, 700)], T)


@pytest.mark.parametrize(("low", "high"), [(-1, 5), (5, 5), (6, 5)])
def test_ranges_that_hold_nothing_are_refused(low: int, high: int) -> None:
    with pytest.raises(ConfigError, match="low must be"):
        TimestepRange(low, high)
