"""What an expert may be trained towards: Huber, offset noise, input perturbation and timestep bias in closed form."""

import math
from collections.abc import Iterator
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.conditioning import PromptEmbeds
from shared.errors import ConfigError
from shared.latents import LatentMoments
from shared.schedule import (
    STRATUM_BITS,
    NoiseSchedule,
    PredictionType,
    TimestepRange,
    cumulate,
    invert,
    sample_biased_timesteps,
    scaled_linear_betas,
)
from trainer.batch import Batch
from trainer.config import LossConfig
from trainer.loop import train_expert
from trainer.loss import DenoisingLoss, place_noise, pseudo_huber
from trainer.timestep_bias import TimestepBias, timestep_shares

BASE, REFINER, WHOLE = TimestepRange(350, 1000), TimestepRange(0, 350), TimestepRange(0, 1000)
PLACES = [(0, 3), (0, 9), (4, 1)]
CPU = torch.device("cpu")
BIASES = [
    TimestepBias(strategy="earlier", multiplier=3.0, portion=0.2),
    TimestepBias(strategy="later", multiplier=5.0, portion=0.5),
    TimestepBias(strategy="logit-normal", mean=-0.4, std=0.7),
    TimestepBias(strategy="table", table=(1.0, 0.0, 2.5)),
]


def schedule(zero_terminal_snr: bool = False) -> NoiseSchedule:
    return NoiseSchedule(scaled_linear_betas(1000, 0.00085, 0.012), zero_terminal_snr=zero_terminal_snr)


def objective(
    within: TimestepRange = WHOLE, kind: PredictionType = "epsilon", zero_terminal_snr: bool = False, **settings: Any
) -> DenoisingLoss:
    return DenoisingLoss(schedule(zero_terminal_snr), within, kind, 0.5, LossConfig(**settings), seed=1)


def batch_of(mean: Tensor) -> Batch:
    text = PromptEmbeds(torch.zeros(len(mean), 77, 2), torch.zeros(len(mean), 2))
    return Batch(LatentMoments(mean, None), text, torch.zeros(len(mean), 6), PLACES[: len(mean)])


class Shown:
    """A network that answers zeros and remembers what it was shown."""

    def __call__(self, x: Tensor, t: Tensor, text: PromptEmbeds, time_ids: Tensor) -> Tensor:
        self.x = x
        return torch.zeros_like(x)


# --- Huber ---


@pytest.mark.parametrize("kind", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_huber_c_by_its_formula(kind: Any, zero_terminal_snr: bool) -> None:
    own = schedule(zero_terminal_snr)
    for t in (0, 349, 350, 999):
        alpha, sigma = math.sqrt(own.abar[t]), math.sqrt(1 - own.abar[t])
        ratio = math.inf if alpha == 0 else sigma / alpha
        expected = {"constant": 0.1, "exponential": 0.1 ** (t / 1000), "snr": 0.9 / (1 + ratio) ** 2 + 0.1}[kind]
        assert own.huber_c(kind, 0.1, torch.tensor([t])).item() == pytest.approx(expected, rel=1e-5)


def test_pseudo_huber_is_square_below_and_linear_above() -> None:
    c = torch.tensor([0.1, 2.0])
    error = torch.tensor([[0.0, 1e-4, -0.3, 50.0], [0.0, -1e-3, 3.0, -800.0]], dtype=torch.float64)
    exact = 2 * c[:, None] * (torch.sqrt(error**2 + c[:, None].double() ** 2) - c[:, None])
    torch.testing.assert_close(pseudo_huber(error, c), exact, rtol=1e-6, atol=1e-14)
    small = torch.tensor([[1e-5]])
    assert pseudo_huber(small, c[:1]).item() == pytest.approx(1e-10, rel=1e-5)  # in fp32 the textbook's form gives 0
    slope = pseudo_huber(torch.tensor([[1001.0]]), c[:1]) - pseudo_huber(torch.tensor([[1000.0]]), c[:1])
    assert slope.item() == pytest.approx(2 * 0.1, rel=1e-3)


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_under_huber_by_hand(gamma: float | None) -> None:
    eps, x_0, t = torch.full((1, 4, 2, 2), 0.7), torch.full((1, 4, 2, 2), 2.0), torch.tensor([40])
    loss = objective(type="huber", huber_c=0.05, huber_schedule="exponential", min_snr_gamma=gamma)
    c = 0.05 ** (40 / 1000)
    snr = float(schedule().abar[40] / (1 - schedule().abar[40]))
    weight = 1.0 if gamma is None else min(snr, gamma) / snr
    got = loss.at(Shown(), batch_of(x_0), t, eps, torch.zeros_like(eps))
    assert got.item() == pytest.approx(weight * 2 * c * (math.sqrt(0.7**2 + c**2) - c), rel=1e-5)
    plain = loss.unweighted().at(Shown(), batch_of(x_0), t, eps, torch.zeros_like(eps))
    assert plain.item() == pytest.approx(0.7**2, rel=1e-5)


# --- noise ---


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_offset_noise_is_one_value_a_channel_and_is_learned(kind: PredictionType) -> None:
    mean, t, seen = (
        torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(0)),
        torch.tensor([5, 500, 990]),
        Shown(),
    )
    loss, plain = objective(kind=kind, offset_noise=0.1), objective(kind=kind)
    offset = 0.1 * place_noise(1, "offset", PLACES, torch.zeros(3, 4, 1, 1))
    assert offset.flatten().unique().numel() == 12
    eps = plain.noise("eps", batch_of(mean)) + offset
    expected = plain.at(Shown(), batch_of(mean), t, eps, torch.zeros_like(mean))
    assert torch.equal(loss(seen, batch_of(mean), t), expected)
    torch.testing.assert_close(seen.x, schedule().add_noise(0.5 * mean, eps, t))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_input_perturbation_changes_what_is_shown_and_not_what_is_asked(kind: PredictionType) -> None:
    mean, t = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 500, 990])
    plain, perturbed = Shown(), Shown()
    batch = batch_of(mean)
    without = objective(kind=kind)(plain, batch, t)
    assert torch.equal(objective(kind=kind, input_perturbation=0.2)(perturbed, batch, t), without)
    noise = place_noise(1, "perturbation", PLACES, mean)
    expected = plain.x + 0.2 * schedule().sigma(t)[:, None, None, None] * noise
    torch.testing.assert_close(perturbed.x, expected, rtol=1e-5, atol=1e-6)


def test_each_draw_is_its_own() -> None:
    like = torch.zeros(3, 4, 4, 4)
    draws = [place_noise(1, what, PLACES, like) for what in ("eps", "posterior", "offset", "perturbation")]
    for i, one in enumerate(draws):
        for other in draws[i + 1 :]:
            assert not torch.isclose(one, other).flatten(1).all(dim=1).any()


def test_what_is_fixed_is_not_offset() -> None:
    """`at` takes noise as it is given: evaluation sees neither offset nor perturbation."""
    mean = torch.ones(1, 4, 2, 2)
    noisy, plain = Shown(), Shown()
    given = (batch_of(mean), torch.tensor([500]), mean, mean)
    assert objective(offset_noise=1.0, input_perturbation=1.0).at(noisy, *given) == objective().at(plain, *given)
    assert torch.equal(noisy.x, plain.x)


# --- timestep bias ---


def densities() -> Iterator[Any]:
    """A bias, a range, and the relative weight of the i-th of n timesteps by its definition."""
    yield TimestepBias(strategy="earlier", multiplier=3, portion=0.2), BASE, lambda i, n: 3 if i < 130 else 1
    yield TimestepBias(strategy="later", multiplier=0.5, portion=0.1), REFINER, lambda i, n: 0.5 if i >= 315 else 1
    yield TimestepBias(strategy="range", multiplier=4, low=400, high=500), BASE, lambda i, n: 4 if 50 <= i < 150 else 1
    yield TimestepBias(strategy="range", multiplier=0, high=500), BASE, lambda i, n: 0 if i < 150 else 1

    def logit_normal(i: int, n: int) -> float:
        def cdf(u: float) -> float:
            return 0.0 if u == 0 else 1.0 if u == 1 else NormalDist(0.3, 0.8).cdf(math.log(u / (1 - u)))

        return cdf((i + 1) / n) - cdf(i / n)

    yield TimestepBias(strategy="logit-normal", mean=0.3, std=0.8), BASE, logit_normal
    weights = (2.0, 0.0, 1.0, 5.0, 1.0)
    yield TimestepBias(strategy="table", table=weights), REFINER, lambda i, n: weights[i * 5 // n]


@pytest.mark.parametrize(("bias", "within", "weight"), list(densities()))
def test_shares_are_those_of_the_definition(bias: TimestepBias, within: TimestepRange, weight: Any) -> None:
    n = len(within)
    expected = [weight(i, n) for i in range(n)]
    shares = timestep_shares(bias, within)
    assert shares.tolist() == pytest.approx([w / sum(expected) for w in expected], abs=1e-12)
    sums = cumulate(shares)
    drawn = sums.diff(prepend=torch.zeros(1, dtype=torch.int64)).double() / (1 << STRATUM_BITS)
    assert (drawn - shares).abs().max() <= 2.0**-STRATUM_BITS
    assert not drawn[shares == 0].any()


def test_a_table_that_does_not_divide_the_range_is_integrated() -> None:
    shares = timestep_shares(TimestepBias(strategy="table", table=(1.0, 3.0)), TimestepRange(0, 3))
    assert shares.tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6])


@pytest.mark.parametrize("bias", BIASES, ids=lambda bias: bias.strategy)
@pytest.mark.parametrize("count", [1, 3, 8, 64, 2048])
def test_every_edge_of_every_share_is_met_exactly(bias: TimestepBias, count: int) -> None:
    """The least and the greatest draw that lands on a timestep do; one further lands on its neighbour."""
    sums = cumulate(timestep_shares(bias, BASE))
    one = 1 << STRATUM_BITS
    reached = torch.cat([sums[:-1] - 1, sums[:-1]])
    for edge in reached[:: max(1, len(reached) // 40)].tolist():
        if not 0 <= edge < one:
            continue
        stratum, rest = divmod(edge * count, one)
        draws = torch.zeros(count, dtype=torch.int64)
        draws[stratum] = min(rest + count - 1, one - 1)  # the greatest that still floors to `edge`
        t = int(invert(BASE, sums, draws)[stratum]) - BASE.low
        below = 0 if t == 0 else int(sums[t - 1])
        place = (stratum * one + int(draws[stratum])) // count
        assert below <= place < int(sums[t])
    last, first = int((sums < one).sum()), int((sums == 0).sum())  # rarer than 2**-31 is never
    assert int(invert(BASE, sums, torch.full((count,), one - 1)).max()) == BASE.low + last
    assert int(invert(BASE, sums, torch.zeros(count, dtype=torch.int64)).min()) == BASE.low + first


@pytest.mark.parametrize("bias", BIASES, ids=lambda bias: bias.strategy)
@pytest.mark.parametrize("within", [BASE, REFINER])
def test_a_biased_step_stays_stratified(bias: TimestepBias, within: TimestepRange) -> None:
    """In any stretch of timesteps there are as many draws as its share says, to within one at either end."""
    shares, generator = timestep_shares(bias, within), torch.Generator().manual_seed(0)
    sums = cumulate(shares)
    for count in (1, 7, 64, 4096):
        t = sample_biased_timesteps(within, sums, count, generator)
        assert t.min() >= within.low
        assert t.max() < within.high
        hits = torch.bincount(t - within.low, minlength=len(within)).double()
        below = torch.cat([torch.zeros(1), (hits.cumsum(0) - count * shares.cumsum(0))])
        assert float(below.abs().max()) <= 1 + 1e-6 * count


def test_over_many_steps_of_one_sample_draws_have_their_shares() -> None:
    loss = objective(BASE, timestep_bias=TimestepBias(strategy="table", table=(4.0, 0.0, 1.0, 2.0, 3.0)))
    drawn = torch.cat([loss.timesteps(step, 1, CPU) for step in range(20_000)]) - 350
    counts = torch.bincount(drawn // 130, minlength=5).double()
    expected = 20_000 * torch.tensor([0.4, 0.0, 0.1, 0.2, 0.3])
    assert counts[1] == 0
    used = expected > 0
    assert float(((counts - expected)[used] ** 2 / expected[used]).sum()) < 16.3  # chi-square, 3 degrees, p = 0.001


def test_biased_draws_depend_on_the_step_alone() -> None:
    loss = objective(BASE, timestep_bias=BIASES[2])
    assert torch.equal(loss.timesteps(5, 12, CPU), loss.timesteps(5, 12, CPU))
    assert not torch.equal(loss.timesteps(5, 12, CPU), loss.timesteps(6, 12, CPU))
    assert not torch.equal(loss.timesteps(5, 12, CPU), objective(BASE).timesteps(5, 12, CPU))


@pytest.mark.parametrize(
    ("sets", "why"),
    [
        (["loss.timestep_bias={strategy='range', low=100, high=500}"], r"\[100, 500\) does not lie inside"),
        (["loss.timestep_bias={strategy='range', low=500, high=400}"], r"\[500, 400\) does not lie inside"),
        (["loss.timestep_bias={strategy='later', portion=1.0, multiplier=0}"], r"no timestep of \[350, 1000\)"),
        (["loss.timestep_bias={strategy='table'}"], "one above 0"),
        (["loss.timestep_bias={strategy='table', table=[1, -1, 3]}"], "one above 0"),
        (["loss.timestep_bias={strategy='logit-normal', std=0}"], r"loss\.timestep_bias\.std"),
        (["loss.type=l1"], r"loss\.type"),
        (["loss.huber_c=0"], r"loss\.huber_c"),
        (["loss.offset_noise=1.5"], r"loss\.offset_noise"),
        (["timesteps={low=999, high=1000}", "loss.min_snr_gamma=5"], "which zero_terminal_snr makes 0"),
        (["schedule.prediction_type=epsilon"], "says nothing about the picture"),
    ],
)
def test_what_cannot_be_is_refused(world: Any, sets: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        world.config(*sets)


def test_all_of_it_trains_and_goes_on_bit_for_bit(world: Any, files_of: Any, tmp_path: Any) -> None:
    sets = (
        "loss={type='huber', offset_noise=0.05, input_perturbation=0.1, min_snr_gamma=5}",
        "loss.timestep_bias={strategy='logit-normal', mean=0.5}",
        "batch=1",
    )
    train_expert(world.request(tmp_path / "whole", *sets, "steps=4"))
    train_expert(world.request(tmp_path / "broken", *sets, "steps=2"))
    train_expert(world.request(tmp_path / "broken", *sets, "steps=4"))
    assert files_of(tmp_path / "whole", 4) == files_of(tmp_path / "broken", 4)
