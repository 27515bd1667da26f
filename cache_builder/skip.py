"""Which pictures a build leaves out on purpose, by their size alone; scan.py counts each with its reason."""

from pydantic import Field, model_validator

from cache_builder.buckets import Measure, Size, enlargement, size_px
from shared.config import Config


class SkipRules(Config):
    """Pictures that are left out and counted; sizes are measured as images.resolution_type says."""

    min_size: int | None = Field(None, ge=1)
    """Smaller pictures are left out, pixels."""
    max_size: int | None = Field(None, ge=1)
    """Larger pictures are left out, pixels; to use them smaller instead is images.downsample_to."""
    min_aspect: float | None = Field(None, gt=0)
    """Pictures with a lower width over height are left out."""
    max_aspect: float | None = Field(None, gt=0)
    """Pictures with a higher width over height are left out."""
    max_upscale: float | None = Field(None, ge=1)
    """Pictures that their bucket would enlarge by more than this factor are left out; unset, they are only counted."""
    max_samples: int | None = Field(None, ge=1)
    """Samples that are kept of each data set, chosen by a hash of (seed, picture); the others are left out."""

    @model_validator(mode="after")
    def _leaves_something(self) -> "SkipRules":
        for low, high in (("min_size", "max_size"), ("min_aspect", "max_aspect")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise ValueError(f"{low} {least} is above {high} {most}: no picture could be both")
        return self


def reason_to_skip(size_hw: Size, bucket_hw: Size, rules: SkipRules, measure: Measure) -> str | None:
    """Why a picture of `size_hw` is left out, without numbers of its own so that reasons can be counted; or None."""
    size, aspect = size_px(size_hw, measure), size_hw[1] / size_hw[0]
    if rules.min_size is not None and size < rules.min_size:
        return f"smaller than images.skip.min_size = {rules.min_size}"
    if rules.max_size is not None and size > rules.max_size:
        return f"larger than images.skip.max_size = {rules.max_size}"
    if rules.min_aspect is not None and aspect < rules.min_aspect:
        return f"narrower than images.skip.min_aspect = {rules.min_aspect}"
    if rules.max_aspect is not None and aspect > rules.max_aspect:
        return f"wider than images.skip.max_aspect = {rules.max_aspect}"
    if rules.max_upscale is not None and enlargement(size_hw, bucket_hw) > rules.max_upscale:
        return f"would be enlarged by more than images.skip.max_upscale = {rules.max_upscale}"
    return None
