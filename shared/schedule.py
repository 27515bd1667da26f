"""The noise schedule: timesteps, betas, noising, targets and weights. Everything about t is on this page.

Symbols are those of Ho et al. 2020 (DDPM, arXiv:2006.11239) and Salimans & Ho 2022 (v-prediction, arXiv:2202.00512):

    x_t = alpha_t x_0 + sigma_t eps      alpha_t = sqrt(abar_t)   sigma_t = sqrt(1 - abar_t)   abar_t = prod(1 - beta)
    v_t = alpha_t eps - sigma_t x_0        snr_t = abar_t / (1 - abar_t)

Timesteps are integers in [0, T), 0 = clean. Tables are made in fp64 on the CPU and used in fp32 wherever t lives.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shared.errors import ConfigError, ContractError

PredictionType = Literal["epsilon", "v_prediction", "sample"]
HuberSchedule = Literal["constant", "exponential", "snr"]

STRATUM_BITS = (
    31  # a uniform draw u is the integer u * 2**31: floor(n (i + u) / N) is then exact, and below n for any u
)


@dataclass(frozen=True, order=True)
class TimestepRange:
    """The half-open range [low, high) of timesteps that one expert answers for."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise ConfigError(f"timesteps [{self.low}, {self.high}): low must be at least 0 and below high")

    def __contains__(self, t: float) -> bool:
        return self.low <= t < self.high

    def __len__(self) -> int:
        return self.high - self.low

    def __str__(self) -> str:
        return f"[{self.low}, {self.high})"


def check_partition(ranges: Iterable[TimestepRange], num_timesteps: int) -> None:
    """Require that `ranges` tile [0, num_timesteps), without gap or overlap; raises ContractError naming the fault."""
    reached = 0
    for part in sorted(ranges):
        if part.low > reached:
            raise ContractError(f"no expert answers for timesteps [{reached}, {part.low})")
        if part.low < reached:
            raise ContractError(f"two experts answer for timesteps [{part.low}, {min(reached, part.high)})")
        reached = part.high
    if reached < num_timesteps:
        raise ContractError(f"no expert answers for timesteps [{reached}, {num_timesteps})")
    if reached > num_timesteps:
        raise ContractError(f"timesteps [{num_timesteps}, {reached}) are beyond the schedule's {num_timesteps}")


def sample_timesteps(within: TimestepRange, count: int, generator: torch.Generator) -> Tensor:
    """Stratified timesteps for one optimizer step, int64 [count], on the generator's device.

    t_i = low + floor(n (i + u_i) / count), permuted: one draw in each of `count` equal strata (the low-discrepancy
    sampler of Kingma et al. 2021, arXiv:2107.00630, appendix I.1, made exact for integers). Every t of the range is
    reachable and equally likely whatever the count, above and below the width of the range.
    """
    device = generator.device
    draws = torch.randint(0, 1 << STRATUM_BITS, (count,), generator=generator, device=device)
    order = torch.randperm(count, generator=generator, device=device)
    return stratify(within, draws)[order]


def stratify(within: TimestepRange, draws: Tensor) -> Tensor:
    """low + floor(n (i + u_i) / N) in exact integers; `draws` are u_i * 2**STRATUM_BITS, int64 [N]."""
    end = len(draws) << STRATUM_BITS
    reached = torch.arange(0, end, 1 << STRATUM_BITS, device=draws.device).add_(draws)
    return reached.mul_(len(within)).floor_divide_(end).add_(within.low)


def cumulate(shares: Tensor) -> Tensor:
    """Sums of the shares of all draws in units of 2**-STRATUM_BITS, int64 [n], the last exactly 2**STRATUM_BITS.

    `shares` are fp64 [n] of sum 1 on the CPU. A timestep whose sum is that of the one before is never drawn.
    """
    sums = (shares.cumsum(0) / shares.sum() * (1 << STRATUM_BITS)).round().long()
    drawn = torch.nonzero(shares)[-1]  # rounding must not give the tail of the range what its shares do not
    sums[drawn:] = 1 << STRATUM_BITS
    return sums


def sample_biased_timesteps(within: TimestepRange, sums: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Like sample_timesteps, with the shares that `sums` (of cumulate, on the generator's device) were made of.

    Inverse CDF: strata are equal in probability, so timestep t is drawn floor or ceil of count * share times, but for
    strata that reach over an edge of it.
    """
    device = generator.device
    draws = torch.randint(0, 1 << STRATUM_BITS, (count,), generator=generator, device=device)
    order = torch.randperm(count, generator=generator, device=device)
    return invert(within, sums, draws)[order]


def invert(within: TimestepRange, sums: Tensor, draws: Tensor) -> Tensor:
    """The timestep at (i + u_i) / N of the summed shares, in exact integers; `draws` as stratify takes them."""
    strata = torch.arange(len(draws), device=draws.device)
    reached = ((strata << STRATUM_BITS) + draws) // len(draws)  # in [0, 2**STRATUM_BITS)
    return within.low + torch.searchsorted(sums, reached, right=True)


def scaled_linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Betas whose square roots are evenly spaced (Stable Diffusion's), fp64 [T]."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2


def linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Evenly spaced betas (DDPM's), fp64 [T]."""
    return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)


BETAS = {"scaled_linear": scaled_linear_betas, "linear": linear_betas}


def rescale_zero_terminal_snr(abar: Tensor) -> Tensor:
    """Shift and scale sqrt(abar) so that the last is exactly 0 and the first unchanged (Lin et al. 2023, algorithm 1).

    `abar` is fp64 [T]; arXiv:2305.08891.
    """
    root = abar.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * (first / (first - last))) ** 2


class NoiseSchedule:
    """The forward process of one schedule; `betas` fp64 [T] on the CPU, tables fp32 on `device`."""

    def __init__(self, betas: Tensor, *, zero_terminal_snr: bool = False, device: torch.device | str = "cpu") -> None:
        abar = torch.cumprod(1 - betas.double(), dim=0)
        self.abar = rescale_zero_terminal_snr(abar) if zero_terminal_snr else abar  # fp64 [T], CPU
        self.zero_terminal_snr = zero_terminal_snr
        self.device = torch.device(device)
        self._alpha = self.abar.sqrt().float().to(device)
        self._sigma = (1 - self.abar).sqrt().float().to(device)
        self._snr = (self.abar / (1 - self.abar)).float().to(device)

    def __len__(self) -> int:
        return len(self.abar)

    def alpha(self, t: Tensor) -> Tensor:
        """alpha_t for int64 t of any shape, fp32."""
        return self._alpha[t]

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_t for int64 t of any shape, fp32."""
        return self._sigma[t]

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha_t^2 / sigma_t^2, fp32; 0 at the last t of a zero-terminal schedule."""
        return self._snr[t]

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t eps; x_0 and eps fp32 [B, ...], t int64 [B]."""
        return _like(self.alpha(t), x_0) * x_0 + _like(self.sigma(t), x_0) * eps

    def target(self, prediction_type: PredictionType, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network is asked for at x_t: eps, v or x_0, fp32 [B, ...]."""
        if prediction_type == "epsilon":
            return eps
        if prediction_type == "v_prediction":
            return _like(self.alpha(t), x_0) * eps - _like(self.sigma(t), x_0) * x_0
        return x_0

    def min_snr_weight(self, prediction_type: PredictionType, gamma: float, t: Tensor) -> Tensor:
        """Weight of the squared error at t, fp32 [B] (Hang et al. 2023, arXiv:2303.09556, section 3.4).

        min(snr, gamma) is the weight in x_0 units; an error in eps is snr times, one in v is snr + 1 times as large.
        For eps the limit at snr = 0 is 1.
        """
        snr = self.snr(t)
        clipped = snr.clamp(max=gamma)
        if prediction_type == "epsilon":
            return torch.where(snr > gamma, clipped / snr, torch.ones_like(snr))
        if prediction_type == "v_prediction":
            return clipped / (snr + 1)
        return clipped

    def huber_c(self, kind: HuberSchedule, c: float, t: Tensor) -> Tensor:
        """Where the pseudo-Huber loss turns from a square into a line at t, fp32 [B] (Khrapov et al. 2024).

        "exponential" is c^(t / T) (arXiv:2403.16728), "snr" (1 - c) (alpha / (alpha + sigma))^2 + c, as
        trainers in use have it: both fall from 1 at no noise to c at full noise.
        """
        if kind == "constant":
            return torch.full(t.shape, c, device=t.device)
        if kind == "exponential":
            return torch.exp(math.log(c) / len(self) * t)
        return (1 - c) * (self.alpha(t) / (self.alpha(t) + self.sigma(t))).square() + c


def check_objective(prediction_type: PredictionType, zero_terminal_snr: bool) -> None:
    """Refuse eps-prediction with zero-terminal SNR: at the last t, x_t is eps and the network learns the identity."""
    if zero_terminal_snr and prediction_type == "epsilon":
        raise ConfigError(
            "prediction_type 'epsilon' says nothing about the picture where the SNR is zero; "
            "with zero_terminal_snr = true use prediction_type = 'v_prediction' or 'sample'"
        )


def _like(per_sample: Tensor, batch: Tensor) -> Tensor:
    return per_sample.view(-1, *(1,) * (batch.ndim - 1))
