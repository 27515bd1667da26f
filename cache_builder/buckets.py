"""Which shape a picture is trained in, and what is cut from it; integers only, no picture is touched here.

true size -> nearest_bucket -> plan_crop -> CropPlan -> (pixels.crop cuts it, the store's key and time_ids name it)
         \\-> own_bucket (crop "off") /

All sizes are (height, width) in pixels. The resized picture covers its bucket: one side is equal, the other is the
nearest integer to the true ratio, so nothing is stretched by more than half a pixel and nothing is resized twice. Where
larger pictures are first brought to a size (`downsample_px`), that is this same one resize, to more than just covers:
the crop is then a window into the picture, and its corner, which time_ids tell, is that of the window.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shared.errors import ConfigError

Size = tuple[int, int]
Crop = Literal["center", "top", "random", "corner", "square", "off"]
Measure = Literal["area", "edge", "long_edge"]  # how a size is one number: root of the area, short edge, long edge

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

    @property
    def crop_top_left(self) -> tuple[int, int]:
        """The corner of the crop in the resized picture, mirrored as the crop is: what time_ids tell."""
        right = self.resize_hw[1] - self.target_hw[1] - self.box_left
        return self.box_top, right if self.flip else self.box_left


def make_buckets(
    resolution_px: int, step_px: int = 64, max_aspect: float = 4.0, measure: Measure = "area"
) -> tuple[Size, ...]:
    """Every size in steps of `step_px` that measures `resolution_px`, sorted; raises ConfigError.

    "area": 0.9 to 1 times resolution^2 pixels; at 1024 in steps of 64 these are the 40 sizes of the SDXL paper
    (appendix I). "edge" and "long_edge": that edge is just `resolution_px`. The square is always among them.
    """
    _check(resolution_px, step_px, max_aspect)
    area = resolution_px**2
    if measure == "area":
        landscape = [
            (short, long)
            for short in range(step_px, resolution_px + 1, step_px)
            for long in range(short, area // short + 1, step_px)
            if 10 * short * long >= AREA_TENTHS * area and long <= max_aspect * short
        ]
    elif measure == "edge":
        longs = range(resolution_px, int(max_aspect * resolution_px) + 1, step_px)
        landscape = [(resolution_px, long) for long in longs]
    else:
        shorts = range(step_px, resolution_px + 1, step_px)
        landscape = [(short, resolution_px) for short in shorts if resolution_px <= max_aspect * short]
    return tuple(sorted({*landscape, *((w, h) for h, w in landscape)}))


def size_px(size_hw: Size, measure: Measure) -> float:
    """A size as one number, pixels: the edge of the square of its area, its short edge or its long edge."""
    return math.sqrt(size_hw[0] * size_hw[1]) if measure == "area" else float(_edge(size_hw, measure))


def own_bucket(size_hw: Size, resolution_px: int, measure: Measure) -> Size:
    """A bucket for one picture alone: it covers it and loses at most 7 px of its long edge, so that 8 divides both.

    Its short edge is the multiple of 8 that is nearest to a size of `resolution_px`.
    """
    short, long = sorted(size_hw)
    near = _short_px(size_hw, resolution_px, measure)
    own_short = max((near + VAE_FACTOR_PX // 2) // VAE_FACTOR_PX, 1) * VAE_FACTOR_PX
    own_long = _round_div(long * own_short, short) // VAE_FACTOR_PX * VAE_FACTOR_PX
    return (own_short, own_long) if size_hw[0] <= size_hw[1] else (own_long, own_short)


def enlargement(size_hw: Size, bucket_hw: Size) -> float:
    """By what factor a picture of `size_hw` grows to cover its bucket; up to 1 it does not."""
    return max(bucket_hw[0] / size_hw[0], bucket_hw[1] / size_hw[1])


def nearest_bucket(size_hw: Size, buckets: Sequence[Size]) -> Size:
    """The bucket nearest to `size_hw` in log aspect; of equals the largest, then the squarest, then the first."""

    def rank(bucket_hw: Size) -> tuple[float, int, int, Size]:
        # max(r, 1/r) orders as |log r| does, and an int / int is correctly rounded: the same bucket on every machine.
        one, other = size_hw[0] * bucket_hw[1], size_hw[1] * bucket_hw[0]
        return max(one, other) / min(one, other), -bucket_hw[0] * bucket_hw[1], max(bucket_hw), bucket_hw

    return min(buckets, key=rank)


def plan_crop(
    size_hw: Size,
    bucket_hw: Size,
    crop: Crop,
    draw: tuple[float, float] | None = None,
    *,
    variant: int = 0,
    downsample_px: int | None = None,
    measure: Measure = "area",
) -> CropPlan:
    """The plan that takes a picture of `size_hw` to `bucket_hw`.

    `draw` = (top, left), uniform in [0, 1), is used by "random" and, for the corner that `variant` counts on from, by
    "corner"; "top" keeps the top of pictures that are higher than wide; the others take the centre. A picture larger
    than `downsample_px` is resized to that size in place of the smallest that covers; none is enlarged for it.
    """
    resize_hw = _cover(size_hw, bucket_hw)
    if downsample_px is not None:
        resize_hw = _downsampled(size_hw, resize_hw, downsample_px, measure)
    free_hw = (resize_hw[0] - bucket_hw[0], resize_hw[1] - bucket_hw[1])
    if crop in ("random", "corner"):
        if draw is None:
            raise ValueError(f"a {crop} crop needs its draw")
        top, left = _at_corner(free_hw, draw, variant) if crop == "corner" else _at_random(free_hw, draw)
    else:
        top, left = free_hw[0] // 2, free_hw[1] // 2
        if crop == "top" and size_hw[0] > size_hw[1]:
            top = 0
    return CropPlan(resize_hw, top, left, bucket_hw)


def _at_random(free_hw: Size, draw: tuple[float, float]) -> Size:
    top, left = (min(int(u * (free + 1)), free) for u, free in zip(draw, free_hw, strict=True))
    return top, left


def _at_corner(free_hw: Size, draw: tuple[float, float], variant: int) -> Size:
    """Successive variants go round the corners, opposite ones first: two variants differ wherever two corners do."""
    first = 2 * int(2 * draw[0]) + int(2 * draw[1])
    corner = first ^ (0, 3, 1, 2)[variant % 4]
    return free_hw[0] * (corner >> 1), free_hw[1] * (corner & 1)


def _downsampled(size_hw: Size, cover_hw: Size, downsample_px: int, measure: Measure) -> Size:
    """`size_hw` brought to `downsample_px`, or left as it is if smaller; `cover_hw` where that would not cover."""
    short, long = sorted(size_hw)
    new_short = min(max(_short_px(size_hw, downsample_px, measure), 1), short)
    new_long = _round_div(long * new_short, short)
    new_hw = (new_short, new_long) if size_hw[0] <= size_hw[1] else (new_long, new_short)
    return new_hw if new_hw[0] >= cover_hw[0] and new_hw[1] >= cover_hw[1] else cover_hw


def _short_px(size_hw: Size, target_px: int, measure: Measure) -> int:
    """The short edge of a picture of `size_hw`'s aspect that measures `target_px`, to the nearest pixel."""
    short, long = sorted(size_hw)
    if measure == "edge":
        return target_px
    if measure == "long_edge":
        return _round_div(target_px * short, long)
    return (math.isqrt(4 * target_px**2 * short // long) + 1) // 2  # the nearest integer to a root


def _edge(size_hw: Size, measure: Measure) -> int:
    return max(size_hw) if measure == "long_edge" else min(size_hw)


def _round_div(numerator: int, denominator: int) -> int:
    """The nearest integer, halves up."""
    return (2 * numerator + denominator) // (2 * denominator)


def _cover(size_hw: Size, bucket_hw: Size) -> Size:
    """The smallest size of `size_hw`'s aspect that covers `bucket_hw`: one side equal, the other rounded half up."""
    (h, w), (bucket_h, bucket_w) = size_hw, bucket_hw
    if bucket_h * w >= bucket_w * h:  # height binds: w * bucket_h / h >= bucket_w, and so is its nearest integer
        return bucket_h, _round_div(w * bucket_h, h)
    return _round_div(h * bucket_w, w), bucket_w


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
