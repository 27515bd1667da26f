"""What an expert is told to see of the data: [data] in its config."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from shared.config import Config

Scalar = bool | int | float | str


class Between(Config):
    """A range of numbers, its ends included; an end that is not given is open."""

    min: float | None = None
    """Smallest that passes."""
    max: float | None = None
    """Largest that passes."""

    @model_validator(mode="after")
    def _in_order(self) -> "Between":
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}: nothing passes")
        return self


class MetaRule(Between):
    """What a column that travelled along must hold; a sample without a value passes no rule."""

    one_of: tuple[Scalar, ...] = ()
    """Values that pass; of a list, one element must be among them."""
    none_of: tuple[Scalar, ...] = ()
    """Values that do not pass."""


class Selection(Config):
    """Samples that pass every rule that is set; all of them where none is."""

    datasets: tuple[str, ...] = ()
    """Ids of data sets."""
    short_side_px: Between | None = None
    """Shorter side of the picture as it came, pixels."""
    area_px: Between | None = None
    """Area of the picture as it came, pixels."""
    aspect: Between | None = None
    """Width over height of the picture as it came."""
    meta: Mapping[str, MetaRule] = Field(default_factory=dict)
    """By column, without "meta_"."""


class WeightRule(Config):
    """How often some samples come."""

    where: Selection = Selection()
    """Which."""
    weight: float = Field(ge=0, le=1000)
    """Times an epoch, beside what other rules say (they multiply); 0 leaves out, 2.5 is two or three times in turn."""


class DataConfig(Config):
    """What of the manifest an expert sees; nothing is encoded anew for it."""

    captions: Literal["random", "first", "all"] = "random"
    """Of several captions one drawn each time, the first, or each of them once an epoch."""
    keep: Selection = Selection()
    """Samples that are trained on."""
    weights: tuple[WeightRule, ...] = ()
    """Samples that come more or less often."""
