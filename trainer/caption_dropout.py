"""Captions that a sample is trained without, so that guidance has something to stand against: drawn sample by sample.

A share that runs with t lets an expert hear of the caption where that decides, and do without where it does not.

config -> dropout_shares, once; batch, t -> may_drop? -> drop_captions -> the batch that loss.py shows the UNet
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field, model_serializer, model_validator
from torch import Tensor

from shared.conditioning import PromptEmbeds
from shared.config import Config
from shared.schedule import TimestepRange
from shared.seeding import derive_seed
from trainer.batch import Batch


class DropoutByTimestep(Config):
    """Shares of samples without their caption at both ends of the expert's range, linear between; a number is both."""

    low: float = Field(ge=0, le=1)
    """At its first timestep, the cleanest."""
    high: float = Field(ge=0, le=1)
    """At its last."""

    @model_validator(mode="before")
    @classmethod
    def _everywhere(cls, share: object) -> object:
        return {"low": share, "high": share} if isinstance(share, (int, float)) else share

    @model_serializer
    def _as_written(self) -> float | dict[str, float]:
        return self.low if self.low == self.high else {"low": self.low, "high": self.high}


def dropout_shares(dropout: DropoutByTimestep, within: TimestepRange) -> Tensor:
    """Share of samples without their caption at each timestep of the range, fp32 [n]."""
    return torch.linspace(dropout.low, dropout.high, len(within), dtype=torch.float32)


def may_drop(places: Sequence[tuple[int, int]], most: float, seed: int) -> bool:
    """Whether the draws can take any caption at these places, where no share is above `most`; no tensor is asked."""
    return any(_draw(seed, place) < most for place in places)


def drop_captions(batch: Batch, shares: Tensor, null_text: PromptEmbeds | None, seed: int) -> Batch:
    """The batch with `null_text` [1, ...], or zeros for None, in place of the captions that the draws take.

    `shares` [B] on the batch's device; each sample's draw is a function of (seed, its place), whatever its share.
    """
    draws = _uniform(seed, batch.places).to(shares.device, non_blocking=True)
    is_dropped = draws < shares

    def without(text: Tensor, null: Tensor | None) -> Tensor:
        mask = is_dropped.view(-1, *(1,) * (text.ndim - 1))
        return text.masked_fill(mask, 0) if null is None else torch.where(mask, null, text)

    nulls = (None, None) if null_text is None else (null_text.prompt_embeds, null_text.pooled_prompt_embeds)
    shown = (batch.text.prompt_embeds, batch.text.pooled_prompt_embeds)
    return replace(batch, text=PromptEmbeds(*map(without, shown, nulls)))


def _uniform(seed: int, places: Sequence[tuple[int, int]]) -> Tensor:
    """A number in [0, 1) for each sample, fp32 [B], on the host."""
    return torch.tensor([_draw(seed, place) for place in places])


def _draw(seed: int, place: tuple[int, int]) -> float:
    return derive_seed(seed, "dropout", *place) / 2**63
