"""Which timesteps of its range an expert draws more often: a bias in the config, as exact shares of all draws.

Draws stay stratified over the whole optimizer step whatever the bias: strata are equal in probability, not in width
(shared/schedule.py inverts the sums of these shares).
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from shared.config import Config
from shared.errors import ConfigError
from shared.schedule import TimestepRange


class TimestepBias(Config):
    """Timesteps of the range that are drawn more often than others; the loss is not weighed against it."""

    strategy: Literal["none", "earlier", "later", "range", "logit-normal", "table"] = "none"
    """"earlier" and "later" favour the low and the high timesteps of the range, "range" those in [low, high)."""
    multiplier: float = Field(2.0, ge=0)
    """How much likelier a favoured timestep is than another ("earlier", "later", "range"); 0 never draws it."""
    portion: float = Field(0.25, gt=0, le=1)
    """Share of the expert's range that "earlier" and "later" favour."""
    low: int | None = Field(None, ge=0)
    """First timestep that "range" favours; the expert's first by default."""
    high: int | None = Field(None, gt=0)
    """First timestep beyond those that "range" favours; the expert's by default."""
    mean: float = 0.0
    """Of "logit-normal": below 0 favours low timesteps of the range, above 0 high ones."""
    std: float = Field(1.0, gt=0)
    """Of "logit-normal": the larger, the more the ends of the range are drawn."""
    table: tuple[float, ...] = ()
    """Of "table": relative weights of equal stretches of the expert's range, lowest timesteps first."""

    @model_validator(mode="after")
    def _table_weighs(self) -> "TimestepBias":
        if self.strategy == "table" and (min(self.table, default=0) < 0 or sum(self.table) <= 0):
            raise ValueError("table needs weights of 0 or more, and one above 0")
        return self


def timestep_shares(bias: TimestepBias, within: TimestepRange) -> Tensor:
    """Share of all draws that falls on each timestep of the range, fp64 [n], of sum 1.

    "logit-normal" is the share of sigmoid(normal(mean, std)) in [i / n, (i + 1) / n) (Esser et al. 2024,
    arXiv:2403.03206, section 3.1, stretched over the range). "earlier", "later" and "range" are those of diffusers'
    training scripts, inside the range. Raises ConfigError where no timestep would be left.
    """
    n = len(within)
    if bias.strategy == "logit-normal":
        shares = _logit_normal(bias.mean, bias.std, n)
    elif bias.strategy == "table":
        shares = _stretched(torch.tensor(bias.table, dtype=torch.float64), n)
    else:
        shares = torch.ones(n, dtype=torch.float64)
        shares[_favoured(bias, within)] = bias.multiplier
    if not shares.sum() > 0:
        raise ConfigError(f"loss.timestep_bias: no timestep of {within} would be drawn")
    return shares / shares.sum()


def _favoured(bias: TimestepBias, within: TimestepRange) -> slice:
    """Places in the range that "earlier", "later" and "range" multiply."""
    n = len(within)
    count = max(1, round(bias.portion * n))
    if bias.strategy == "earlier":
        return slice(0, count)
    if bias.strategy == "later":
        return slice(n - count, n)
    if bias.strategy == "none":
        return slice(0, 0)
    low = within.low if bias.low is None else bias.low
    high = within.high if bias.high is None else bias.high
    if not within.low <= low < high <= within.high:
        raise ConfigError(f"loss.timestep_bias: [{low}, {high}) does not lie inside the expert's timesteps {within}")
    return slice(low - within.low, high - within.low)


def _logit_normal(mean: float, std: float, n: int) -> Tensor:
    edges = torch.arange(n + 1, dtype=torch.float64) / n
    cdf = torch.special.ndtr((torch.logit(edges) - mean) / std)  # logit(0), logit(1): minus and plus infinity
    shares: Tensor = cdf.diff()
    return shares


def _stretched(weights: Tensor, n: int) -> Tensor:
    """Weights of len(weights) equal stretches of [0, 1], integrated over each of n timesteps, fp64 [n]."""
    edges = torch.arange(n + 1, dtype=torch.float64) * len(weights) / n
    sums = torch.cat([weights.new_zeros(1), weights.cumsum(0)])
    whole = edges.floor().long().clamp(max=len(weights) - 1)
    return (sums[whole] + (edges - whole) * weights[whole]).diff()
