"""Crops of every kind: one resize that covers, a box inside it, nothing stretched; mirrored crops mirror exactly."""

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from cache_builder.buckets import (
    CropPlan,
    Measure,
    Size,
    enlargement,
    make_buckets,
    nearest_bucket,
    own_bucket,
    plan_crop,
    size_px,
)
from shared.conditioning import MicroConditioning
from shared.pictures import PixelRules
from tests.pictures import crop

MEASURES: Sequence[Measure] = ("area", "edge", "long_edge")
measures: st.SearchStrategy[Any] = st.sampled_from(MEASURES)
sides = st.integers(1, 9000)
sizes = st.tuples(sides, sides).filter(lambda hw: max(hw) <= 64 * min(hw))
draws = st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2)
BUCKETS = {measure: make_buckets(512, 64, 4.0, measure) for measure in MEASURES}


def is_one_resize_that_covers(size_hw: Size, plan: CropPlan) -> None:
    (h, w), (resize_h, resize_w), (box_h, box_w) = size_hw, plan.resize_hw, plan.target_hw
    assert box_h % 8 == box_w % 8 == 0
    assert 0 <= plan.box_top <= resize_h - box_h
    assert 0 <= plan.box_left <= resize_w - box_w
    # One scale for both edges, to half a pixel: one of them is just an integer, the other is rounded.
    scales = (Fraction(resize_h, h), Fraction(resize_w, w))
    assert any(max(abs(resize_h - h * s), abs(resize_w - w * s)) <= Fraction(1, 2) for s in scales)


@given(sizes, measures, st.sampled_from(["center", "top", "random", "corner"]), draws, st.integers(0, 4))
@example((64, 4096), "area", "corner", (0.0, math.nextafter(1, 0)), 3)
def test_crops_of_every_measure(size_hw: Size, measure: Measure, how: Any, draw: Any, variant: int) -> None:
    bucket_hw = nearest_bucket(size_hw, BUCKETS[measure])
    plan = plan_crop(size_hw, bucket_hw, how, draw, variant=variant, measure=measure)
    is_one_resize_that_covers(size_hw, plan)
    assert plan.target_hw == bucket_hw
    assert plan.resize_hw[0] == bucket_hw[0] or plan.resize_hw[1] == bucket_hw[1]
    assert (enlargement(size_hw, bucket_hw) > 1) == (plan.resize_hw > size_hw)


@given(sizes, measures, draws, st.integers(512, 3000))
@example((512, 512), "area", (0.5, 0.5), 512)
@example((100, 6400), "area", (0.5, 0.5), 700)
def test_what_is_larger_is_brought_to_a_size_and_nothing_is_enlarged_for_it(
    size_hw: Size, measure: Measure, draw: Any, downsample_px: int
) -> None:
    bucket_hw = nearest_bucket(size_hw, BUCKETS[measure])
    plain = plan_crop(size_hw, bucket_hw, "random", draw, measure=measure)
    plan = plan_crop(size_hw, bucket_hw, "random", draw, downsample_px=downsample_px, measure=measure)
    is_one_resize_that_covers(size_hw, plan)
    assert plan.resize_hw[0] >= plain.resize_hw[0]
    assert plan.resize_hw[1] >= plain.resize_hw[1]
    if plan.resize_hw != plain.resize_hw:
        assert plan.resize_hw[0] <= size_hw[0]
        assert plan.resize_hw[1] <= size_hw[1]
        wanted = min(downsample_px, size_px(size_hw, measure))
        slack = max(size_hw) / min(size_hw)  # half a pixel of the short edge, in the measure
        assert abs(size_px(plan.resize_hw, measure) - wanted) <= 0.5 * slack + 0.5


def test_a_picture_between_its_bucket_and_the_size_is_not_resized_at_all() -> None:
    plan = plan_crop((600, 700), (512, 512), "center", downsample_px=1024, measure="edge")
    assert plan == CropPlan((600, 700), 44, 94, (512, 512))
    assert plan_crop((3000, 6000), (512, 512), "center", downsample_px=1024, measure="edge").resize_hw == (1024, 2048)
    assert plan_crop((400, 700), (512, 512), "center", downsample_px=1024, measure="edge").resize_hw == (512, 896)


@given(sizes, measures, st.integers(8, 300).map(lambda n: 8 * n))
@example((999, 1001), "area", 1024)
@example((9000, 9000), "edge", 8)
def test_a_bucket_of_its_own_cuts_only_to_a_multiple_of_eight(size_hw: Size, measure: Measure, px: int) -> None:
    assume(measure != "long_edge" or px * min(size_hw) >= 8 * max(size_hw))  # else its short edge would be under 8
    bucket_hw = own_bucket(size_hw, px, measure)
    plan = plan_crop(size_hw, bucket_hw, "off")
    is_one_resize_that_covers(size_hw, plan)
    short, long = (0, 1) if size_hw[0] <= size_hw[1] else (1, 0)
    assert plan.resize_hw[short] - bucket_hw[short] <= 1
    assert plan.resize_hw[long] - bucket_hw[long] <= 7
    slack = (4.5 + 0.5) * max(size_hw) / min(size_hw) + 8  # the short edge is a multiple of 8, the long one follows
    assert abs(size_px(bucket_hw, measure) - px) <= slack


def test_buckets_by_edge() -> None:
    assert make_buckets(512, 128, 2.0, "edge") == (
        (512, 512), (512, 640), (512, 768), (512, 896), (512, 1024), (640, 512), (768, 512), (896, 512), (1024, 512),
    )  # fmt: skip
    assert make_buckets(512, 128, 2.0, "long_edge") == ((256, 512), (384, 512), (512, 256), (512, 384), (512, 512))
    for measure in MEASURES:
        assert make_buckets(512, 64, 1.0, measure) == ((512, 512),)


@given(st.integers(1, 12), st.sampled_from([8, 16, 64]), st.floats(1, 8), measures)
def test_buckets_measure_what_they_should(steps: int, step_px: int, max_aspect: float, measure: Measure) -> None:
    resolution = steps * step_px
    buckets = make_buckets(resolution, step_px, max_aspect, measure)
    assert (resolution, resolution) in buckets
    for h, w in buckets:
        assert h % step_px == w % step_px == 0
        assert max(h, w) <= max_aspect * min(h, w)
        assert (w, h) in buckets
        assert measure == "area" or size_px((h, w), measure) == resolution


@given(draws, st.integers(0, 40), st.integers(0, 40))
def test_four_variants_go_round_the_corners_opposite_ones_first(draw: Any, free_h: int, free_w: int) -> None:
    size_hw, bucket_hw = (64 + free_h, 64 + free_w), (64, 64)
    plans = [plan_crop(size_hw, bucket_hw, "corner", draw, variant=v, downsample_px=1000) for v in range(4)]
    corners = [(plan.box_top, plan.box_left) for plan in plans]
    assert set(corners) == {(top, left) for top in (0, free_h) for left in (0, free_w)}
    for top, left in corners[1::2]:
        before = corners[corners.index((top, left)) - 1]
        assert (before[0] + top, before[1] + left) == (free_h, free_w)
        break


def test_every_corner_comes_first_equally_often() -> None:
    grid = [((i + 0.5) / 8, (j + 0.5) / 8) for i in range(8) for j in range(8)]
    first = [plan_crop((70, 70), (64, 64), "corner", draw, downsample_px=70) for draw in grid]
    counts = [sum((p.box_top, p.box_left) == corner for p in first) for corner in ((0, 0), (0, 6), (6, 0), (6, 6))]
    assert counts == [16] * 4


@settings(max_examples=40)
@given(
    st.tuples(st.integers(20, 160), st.integers(20, 160)),
    st.sampled_from([(64, 64), (48, 80), (80, 48)]),
    draws,
    st.sampled_from([None, 64, 120]),
    st.sampled_from(["lanczos", "bicubic"]),
)
def test_a_mirrored_crop_is_the_mirror_of_the_crop_and_the_crop_of_the_mirror(
    size_hw: Size, bucket_hw: Size, draw: Any, downsample_px: int | None, resample: Any
) -> None:
    pixels = np.random.default_rng(0).integers(60, 200, (*size_hw, 3), dtype=np.uint8)
    rules = PixelRules(resample=resample)
    plan = plan_crop(size_hw, bucket_hw, "random", draw, downsample_px=downsample_px)
    mirrored = replace(plan, flip=True)
    assert np.array_equal(crop(pixels, mirrored, rules), crop(pixels, plan, rules)[:, ::-1])
    top, left = mirrored.crop_top_left
    assert (top, left) == (plan.box_top, plan.resize_hw[1] - plan.target_hw[1] - plan.box_left)
    assert plan.crop_top_left == (plan.box_top, plan.box_left)
    of_mirror = crop(np.ascontiguousarray(pixels[:, ::-1]), replace(plan, box_top=top, box_left=left), rules)
    assert np.abs(of_mirror.astype(int) - crop(pixels, mirrored, rules)).max() <= 2  # the filter rounds either way
    ids = MicroConditioning(size_hw, mirrored.crop_top_left, mirrored.target_hw).time_ids()
    assert ids.tolist() == [*size_hw, top, left, *bucket_hw]


@pytest.mark.parametrize("how", ["random", "corner"])
def test_what_is_drawn_needs_its_draw(how: Any) -> None:
    with pytest.raises(ValueError, match=f"a {how} crop needs its draw"):
        plan_crop((10, 10), (64, 64), how)
