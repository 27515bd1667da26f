"""How often an expert meets its partner's predictions where the partner hands over to it (trainer/exposure.py)."""

from pydantic import Field

from shared.config import Config
from shared.errors import ConfigError
from shared.schedule import TimestepRange
from trainer.timestep_bias import TimestepBias, timestep_shares


class ExposureConfig(Config):
    """Samples that the expert meets as its partner hands them over, in place of noised truth."""

    share: float = Field(0.0, ge=0, le=1)
    """Share of the samples drawn from the expert's range; above 0 `--partner` names the expert above it."""
    reach: int = Field(100, ge=1)
    """Timesteps below the range's upper edge that such samples lie in, and above it that the partner begins in."""


def chance_in_reach(exposure: ExposureConfig, bias: TimestepBias, within: TimestepRange, num_timesteps: int) -> float:
    """Chance that a sample in reach of the upper edge is one of them, so that they are `share` of all.

    Timesteps are drawn as ever, so exposure changes what is met and not how often. Raises ConfigError where nobody
    hands over, or where fewer samples than `share` are drawn in reach.
    """
    if within.high == num_timesteps:
        raise ConfigError(f"loss.exposure: drawing begins in {within}, nobody hands over to it; set share to 0")
    if exposure.reach > len(within):
        raise ConfigError(f"loss.exposure.reach {exposure.reach} is more than the {len(within)} timesteps of {within}")
    in_reach = float(timestep_shares(bias, within)[-exposure.reach :].sum())
    if exposure.share > in_reach + 1e-9:
        raise ConfigError(
            f"loss.exposure.share {exposure.share:g} is more than the {in_reach:.3g} of samples that are drawn within "
            f"{exposure.reach} timesteps of {within.high}: lower it, or raise loss.exposure.reach"
        )
    return min(1.0, exposure.share / in_reach)
