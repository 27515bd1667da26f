"""Which shape a picture is trained in, and what is cut from it; integers only, no picture is touched here.

true size -> nearest_bucket -> plan_crop -> CropPlan -> (pixels.crop cuts it, the store's key and time_ids name it)

All sizes are (height, width) in pixels. The resized picture covers its bucket: one side is equal, the other is the
nearest integer to the true ratio, so nothing is stretched by more than half a pixel and nothing is resized twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shared.errors import ConfigError

Size = tuple[int, int]
Crop = Literal["center", "random", "top"]

VAE_FACTOR_PX = 8
AREA_TENTHS = 9  # a bucket holds at least this many tenths of resolution^2: with 64 px steps, the SDXL paper's 40 sizes


@dataclass(frozen=True)
class CropPlan:
    """Resize to `resize_hw`, cut the box of `target_hw` at (`box_top`, `box_left`) of what was resized, then mirror."""

    resize_hw: Size
    box_top: int
    box_left: int
    target_hw: Size
    flip: bool = False


def make_buckets(resolution_px: int, step_px: int = 64, max_aspect: float = 4.0) -> tuple[Size, ...]:
    """Every size in steps of `step_px` with 0.9 to 1 times resolution^2 pixels, sorted; raises ConfigError.

    At 1024 in steps of 64 these are the 40 sizes of the SDXL paper (appendix I). The square is always among them.
    """
    _check(resolution_px, step_px, max_aspect)
    area = resolution_px**2
    landscape = [
        (short, long)
        for short in range(step_px, resolution_px + 1, step_px)
        for long in range(short, area // short + 1, step_px)
        if 10 * short * long >= AREA_TENTHS * area and long <= max_aspect * short
    ]
    return tuple(sorted({*landscape, *((w, h) for h, w in landscape)}))


def nearest_bucket(size_hw: Size, buckets: Sequence[Size]) -> Size:
    """The bucket nearest to `size_hw` in log aspect; of equals the largest, then the squarest, then the first."""

    def rank(bucket_hw: Size) -> tuple[float, int, int, Size]:
        # max(r, 1/r) orders as |log r| does, and an int / int is correctly rounded: the same bucket on every machine.
        one, other = size_hw[0] * bucket_hw[1], size_hw[1] * bucket_hw[0]
        return max(one, other) / min(one, other), -bucket_hw[0] * bucket_hw[1], max(bucket_hw), bucket_hw

    return min(buckets, key=rank)


def plan_crop(size_hw: Size, bucket_hw: Size, crop: Crop, draw: tuple[float, float] | None = None) -> CropPlan:
    """The plan that takes a picture of `size_hw` to `bucket_hw`.

    `draw` = (top, left), uniform in [0, 1), is used by "random" alone; "top" keeps the top of pictures that are higher
    than wide and is "center" for the others.
    """
    resize_hw = _cover(size_hw, bucket_hw)
    free_hw = (resize_hw[0] - bucket_hw[0], resize_hw[1] - bucket_hw[1])
    if crop == "random":
        if draw is None:
            raise ValueError("a random crop needs its draw")
        top, left = (min(int(u * (free + 1)), free) for u, free in zip(draw, free_hw, strict=True))
    else:
        top, left = free_hw[0] // 2, free_hw[1] // 2
        if crop == "top" and size_hw[0] > size_hw[1]:
            top = 0
    return CropPlan(resize_hw, top, left, bucket_hw)


def _cover(size_hw: Size, bucket_hw: Size) -> Size:
    """The smallest size of `size_hw`'s aspect that covers `bucket_hw`: one side equal, the other rounded half up."""
    (h, w), (bucket_h, bucket_w) = size_hw, bucket_hw
    if bucket_h * w >= bucket_w * h:  # height binds: w * bucket_h / h >= bucket_w, and so is its nearest integer
        return bucket_h, (2 * w * bucket_h + h) // (2 * h)
    return (2 * h * bucket_w + w) // (2 * w), bucket_w


def _check(resolution_px: int, step_px: int, max_aspect: float) -> None:
    if step_px <= 0 or step_px % VAE_FACTOR_PX:
        raise ConfigError(
            f"bucket step {step_px} px: it must be a multiple of {VAE_FACTOR_PX}, as the VAE's latents are"
        )
    if resolution_px < step_px:
        raise ConfigError(f"bucket step {step_px} px is larger than the resolution, {resolution_px} px")
    if resolution_px % step_px:
        near = round(resolution_px / step_px) * step_px
        raise ConfigError(f"resolution {resolution_px} px is not a multiple of the bucket step {step_px} px; {near} is")
    if not max_aspect >= 1:
        raise ConfigError(f"max_aspect {max_aspect}: it is long side / short side, at least 1")
