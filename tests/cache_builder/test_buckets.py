"""Buckets and crops: covered, inside, unstretched, deterministic."""

import math
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cache_builder.buckets import CropPlan, make_buckets, nearest_bucket, plan_crop
from shared.errors import ConfigError

SDXL = make_buckets(1024, 64)

sides = st.integers(1, 20_000)
sizes = st.tuples(sides, sides)
draws = st.floats(0, 1, exclude_max=True)


def test_sdxl_buckets_are_those_of_the_paper() -> None:
    paper = """
        512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 704x1408
        704x1344 768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024 1024x1024 1024x960
        1088x960 1088x896 1152x896 1152x832 1216x832 1280x768 1344x768 1344x704 1408x704 1472x704 1536x640
        1600x640 1664x576 1728x576 1792x576 1856x512 1920x512 1984x512 2048x512
    """
    assert {f"{h}x{w}" for h, w in SDXL} == set(paper.split())


@given(st.integers(1, 16), st.sampled_from([8, 16, 32, 64]), st.floats(1, 8))
def test_buckets_hold_the_square_keep_the_area_and_mirror(steps: int, step_px: int, max_aspect: float) -> None:
    resolution = steps * step_px
    buckets = make_buckets(resolution, step_px, max_aspect)
    assert (resolution, resolution) in buckets
    assert list(buckets) == sorted(set(buckets))
    for h, w in buckets:
        assert h % step_px == w % step_px == 0
        assert 0.9 * resolution**2 <= h * w <= resolution**2
        assert max(h, w) <= max_aspect * min(h, w)
        assert (w, h) in buckets


def test_small_resolutions() -> None:
    assert make_buckets(64, 64) == ((64, 64),)
    assert make_buckets(128, 64) == ((64, 256), (128, 128), (256, 64))
    assert {(192, 320), (256, 256), (128, 512)} <= set(make_buckets(256, 64))
    assert {(64, 64), (56, 72), (48, 80)} <= set(make_buckets(64, 8))
    assert make_buckets(512, 64, max_aspect=1) == ((512, 512),)


@pytest.mark.parametrize(
    ("resolution_px", "step_px", "max_aspect", "word"),
    [
        (64, 128, 2.0, "larger"),
        (1024, 60, 2.0, "multiple of 8"),
        (1024, 0, 2.0, "multiple of 8"),
        (1000, 64, 2.0, "1024 is"),
        (1024, 64, 0.5, "max_aspect"),
        (1024, 64, math.nan, "max_aspect"),
        (0, 64, 2.0, "larger"),
    ],
)
def test_impossible_settings_are_named(resolution_px: int, step_px: int, max_aspect: float, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        make_buckets(resolution_px, step_px, max_aspect)


@given(sizes)
def test_nearest_is_nearest_in_log_aspect(size_hw: tuple[int, int]) -> None:
    def distance(bucket_hw: tuple[int, int]) -> Fraction:
        ratio = Fraction(size_hw[0] * bucket_hw[1], size_hw[1] * bucket_hw[0])
        return max(ratio, 1 / ratio)

    assert distance(nearest_bucket(size_hw, SDXL)) == min(map(distance, SDXL))


@given(sizes, st.randoms(use_true_random=False))
def test_nearest_knows_no_order_and_turns_with_the_picture(size_hw: tuple[int, int], random: object) -> None:
    shuffled = list(SDXL)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    nearest = nearest_bucket(size_hw, SDXL)
    assert nearest_bucket(size_hw, shuffled) == nearest
    assert nearest_bucket(size_hw[::-1], SDXL) == nearest[::-1]


def test_equal_aspects_take_the_larger_bucket() -> None:
    assert nearest_bucket((500, 500), make_buckets(4096, 64)) == (4096, 4096)


@given(sizes, st.sampled_from(SDXL), st.sampled_from(["center", "random", "top"]), st.tuples(draws, draws))
@example((1, 10_000), (512, 2048), "random", (0.0, math.nextafter(1, 0)))
@example((10_000, 1), (512, 2048), "center", (0.0, 0.0))
@example((3, 5), (2048, 512), "top", (0.5, 0.5))
def test_covered_inside_and_not_stretched(
    size_hw: tuple[int, int], bucket_hw: tuple[int, int], crop: str, draw: tuple[float, float]
) -> None:
    plan = plan_crop(size_hw, bucket_hw, crop, draw)  # type: ignore[arg-type]
    (h, w), (resize_h, resize_w), (bucket_h, bucket_w) = size_hw, plan.resize_hw, bucket_hw
    assert plan.target_hw == bucket_hw
    assert not plan.flip
    assert resize_h >= bucket_h
    assert resize_w >= bucket_w
    assert resize_h == bucket_h or resize_w == bucket_w
    assert 0 <= plan.box_top <= resize_h - bucket_h
    assert 0 <= plan.box_left <= resize_w - bucket_w
    scale = max(Fraction(bucket_h, h), Fraction(bucket_w, w))
    assert abs(resize_h - h * scale) <= Fraction(1, 2)
    assert abs(resize_w - w * scale) <= Fraction(1, 2)


@given(sizes, st.sampled_from(SDXL))
def test_centre_turns_with_the_picture(size_hw: tuple[int, int], bucket_hw: tuple[int, int]) -> None:
    plan, turned = plan_crop(size_hw, bucket_hw, "center"), plan_crop(size_hw[::-1], bucket_hw[::-1], "center")
    assert turned == CropPlan(plan.resize_hw[::-1], plan.box_left, plan.box_top, plan.target_hw[::-1])


def test_every_offset_of_a_random_crop_is_reached() -> None:
    lefts = [plan_crop((64, 70), (64, 64), "random", (0.0, i / 700)).box_left for i in range(700)]
    assert [lefts.count(left) for left in range(7)] == [100] * 7
    assert plan_crop((64, 70), (64, 64), "random", (0.0, math.nextafter(1, 0))).box_left == 6


def test_top_keeps_the_top_of_portraits_alone() -> None:
    assert plan_crop((300, 100), (64, 64), "top") == CropPlan((192, 64), 0, 0, (64, 64))
    assert plan_crop((100, 300), (64, 64), "top") == CropPlan((64, 192), 0, 64, (64, 64))
    assert plan_crop((100, 120), (64, 256), "top").box_top == (213 - 64) // 2


def test_a_random_crop_needs_its_draw() -> None:
    with pytest.raises(ValueError, match="draw"):
        plan_crop((10, 10), (64, 64), "random")
