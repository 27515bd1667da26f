"""Timesteps beyond its range that an expert is trained on too, so that its training does not end where it hands over.

It answers for its range alone: ensemble, evaluation and contract never see the overlap.

config -> drawn_range, once a step -> the range that loss.py draws that step's timesteps from
"""

from pydantic import Field, model_serializer, model_validator

from shared.config import Config
from shared.contract import OverlapFacts
from shared.schedule import TimestepRange
from shared.seeding import derive_seed


class Overlap(Config):
    """How far training reaches beyond the range, at each edge where another expert goes on; a number is the width."""

    width: int = Field(0, ge=0)
    """Timesteps beyond the edge, cut at the ends of the schedule; 0 trains the range alone."""
    jitter: bool = False
    """Each optimizer step draws how far its edges lie, from 0 to width; off: width in every step."""

    @model_validator(mode="before")
    @classmethod
    def _always(cls, width: object) -> object:
        return {"width": width} if isinstance(width, (int, float)) and not isinstance(width, bool) else width

    @model_serializer
    def _as_written(self) -> int | dict[str, int | bool]:
        return {"width": self.width, "jitter": True} if self.jitter else self.width

    def facts(self) -> OverlapFacts | None:
        """What is recorded of it; None where there is none."""
        return OverlapFacts(width=self.width, jitter=self.jitter) if self.width else None


def widest_range(overlap: Overlap, within: TimestepRange, num_timesteps: int) -> TimestepRange:
    """Every timestep that training may draw."""
    return _widened(within, num_timesteps, overlap.width, overlap.width)


def drawn_range(overlap: Overlap, within: TimestepRange, num_timesteps: int, seed: int, step: int) -> TimestepRange:
    """The range of one optimizer step: a function of (seed, step), and the same in all steps without jitter.

    Jitter draws each edge's width uniformly from 0 to overlap.width, both among them. So the own range is always
    trained whole, and a timestep d beyond the edge in a share (width + 1 - d) / (width + 1) of the steps.
    """
    if not overlap.jitter:
        return widest_range(overlap, within, num_timesteps)
    low, high = (derive_seed(seed, "overlap", edge, step) * (overlap.width + 1) >> 63 for edge in ("low", "high"))
    return _widened(within, num_timesteps, low, high)


def _widened(within: TimestepRange, num_timesteps: int, below: int, above: int) -> TimestepRange:
    return TimestepRange(max(0, within.low - below), min(num_timesteps, within.high + above))
