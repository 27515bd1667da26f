"""Who is held out: the right share, the same everywhere, copies with their originals and nothing else with them."""

import io
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from cache_builder.config import SplitRules
from cache_builder.split import THUMBNAIL_HWC, Thumbnail, held_out
from demo.draw import draw
from demo.scene import make_scene
from shared.pictures import PixelLimits, PixelRules, decode
from tests.pictures import thumbnail

FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.5)


def chosen(thumbnails: Sequence[Thumbnail], paths: Sequence[str] = (), **rules: Any) -> list[bool]:
    thumbs = np.frombuffer(b"".join(thumbnails), np.uint8).reshape(-1, *THUMBNAIL_HWC)
    return held_out(SplitRules(**rules), paths or [f"{i}.png" for i in range(len(thumbnails))], thumbs).tolist()


LARGE_HW = ((96, 96), (96, 128), (128, 96), (128, 128))  # halved, smaller ones are too small to be told from others


def saved(image: Image.Image, **how: Any) -> Thumbnail:
    """The thumbnail of a picture that went through a file."""
    file = io.BytesIO()
    image.save(file, **how)
    return thumbnail(decode(file.getvalue(), PixelRules(), PixelLimits()))


def photo_like(seed: int) -> Image.Image:
    """Noise of every scale with the statistics of a photograph, under a few discs."""
    rng = np.random.default_rng(seed)
    h, w = (int(side) for side in rng.integers(120, 400, 2))
    pixels = np.zeros((h, w, 3))
    for octave in range(7):
        strength = 90 * rng.uniform(0.5, 1) ** octave
        coarse = rng.normal(0, strength, (2**octave + 1, 2**octave + 1, 4)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(0.4 * coarse[..., channel] + coarse[..., 3])
            pixels[..., channel] += np.asarray(layer.resize((w, h), Image.Resampling.BICUBIC))
    pixels = pixels * rng.uniform(0.3, 1) + rng.uniform(60, 190)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    canvas = ImageDraw.Draw(image)
    for x, y, r in rng.integers(10, 120, (seed % 5, 3)).tolist():
        canvas.ellipse((x, y, x + r, y + r), fill=(x, y, r))
    return image


def sketch(seed: int) -> Image.Image:
    """Lines on white."""
    rng = random.Random(seed)
    w, h = rng.randint(256, 800), rng.randint(256, 800)
    image = Image.new("RGB", (w, h), "white")
    for _ in range(rng.randint(1, 5)):
        points = [(rng.uniform(0.2, 0.8) * w, rng.uniform(0.2, 0.8) * h) for _ in range(rng.randint(2, 6))]
        ImageDraw.Draw(image).line(points, fill=rng.choice(["black", "navy"]), width=4)
    return image.resize((w // 2, h // 2), Image.Resampling.LANCZOS)


def copies(image: Image.Image, rng: random.Random) -> list[Thumbnail]:
    """Rescaled, compressed, and both."""
    scale = rng.uniform(0.5, 0.9)
    filters = [Image.Resampling.LANCZOS, Image.Resampling.BICUBIC, Image.Resampling.BILINEAR]
    small = image.resize((round(image.width * scale), round(image.height * scale)), rng.choice(filters))
    how = {"format": "JPEG", "quality": rng.randint(60, 90)}
    return [saved(small, format="PNG"), saved(image, **how), saved(small, **how)]


@pytest.fixture(scope="module")
def families() -> list[list[Thumbnail]]:
    """A hundred pictures of three kinds, each with three near copies."""
    rng = random.Random(0)
    pictures = [photo_like(seed) for seed in range(64)]
    pictures += [draw(make_scene(1, index, sizes_hw=LARGE_HW)) for index in range(60)] + [
        sketch(seed) for seed in range(20)
    ]
    return [[saved(picture, format="PNG"), *copies(picture, rng)] for picture in pictures]


@pytest.fixture(scope="module")
def drawings() -> list[Thumbnail]:
    """512 drawings that differ."""
    return [thumbnail(np.asarray(draw(make_scene(0, index)))) for index in range(512)]


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_near_copies_fall_on_one_side(families: list[list[Thumbnail]], fraction: float) -> None:
    everything = [thumb for family in families for thumb in family]
    for salt in "abcdef":
        sides = np.array(chosen(everything, eval_fraction=fraction, salt=salt)).reshape(len(families), -1)
        assert (sides.all(axis=1) | ~sides.any(axis=1)).all()
        assert sides.any() or fraction < 0.05


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_the_share_is_as_asked_for_pictures_that_differ(drawings: list[Thumbnail], fraction: float) -> None:
    shares = [np.mean(chosen(drawings, eval_fraction=fraction, salt=str(salt))) for salt in range(20)]
    noise = (fraction * (1 - fraction) / len(drawings) / len(shares)) ** 0.5
    assert np.mean(shares) == pytest.approx(fraction, abs=4 * noise)


def test_sketches_are_not_all_alike() -> None:
    """Without a look at the contrast, six in ten of these follow the first ones that are held out."""
    sketches = [thumbnail(np.asarray(sketch(seed))) for seed in range(300)]
    shares = [np.mean(chosen(sketches, eval_fraction=0.05, salt=str(salt))) for salt in range(10)]
    assert np.mean(shares) == pytest.approx(0.05, abs=0.03)


@settings(max_examples=25)
@given(st.integers(0, 1000), st.sampled_from(FRACTIONS), st.sampled_from(FRACTIONS))
def test_raising_the_fraction_keeps_what_was_in(drawings: list[Thumbnail], salt: int, one: float, other: float) -> None:
    low, high = sorted((one, other))
    fewer, more = (chosen(drawings, eval_fraction=f, salt=str(salt)) for f in (low, high))
    assert all(b for a, b in zip(fewer, more, strict=True) if a)


def test_the_salt_holds_out_others(drawings: list[Thumbnail]) -> None:
    one, other = (np.array(chosen(drawings, eval_fraction=0.2, salt=salt)) for salt in ("a", "b"))
    assert 0.02 * len(drawings) < (one & other).sum() < 0.07 * len(drawings)  # chance: 0.04


@settings(max_examples=25)
@given(st.randoms(use_true_random=False), st.sampled_from(FRACTIONS))
def test_order_changes_nothing(families: list[list[Thumbnail]], rng: random.Random, fraction: float) -> None:
    thumbnails = [thumb for family in families[::4] for thumb in family]
    sides = chosen(thumbnails, eval_fraction=fraction)
    order = rng.sample(range(len(thumbnails)), len(thumbnails))
    assert chosen([thumbnails[i] for i in order], eval_fraction=fraction) == [sides[i] for i in order]


def test_known_answers(drawings: list[Thumbnail]) -> None:
    """Data sets that were split before stay split the same way."""
    assert np.flatnonzero(chosen(drawings)).tolist() == [
        20,
        27,
        39,
        113,
        134,
        138,
        140,
        159,
        201,
        219,
        258,
        284,
        324,
        331,
        339,
        420,
        428,
        465,
        476,
        489,
        508,
    ]
    assert np.flatnonzero(
        chosen(drawings[:9], [f"{i % 3}/{i}.png" for i in range(9)], group="folder", eval_fraction=0.5)
    ).tolist() == [1, 4, 7]


def test_folders_stay_together(drawings: list[Thumbnail]) -> None:
    paths = [f"person-{index % 64}/{index}.png" for index in range(512)]
    sides = np.array(chosen(drawings, paths, group="folder", eval_fraction=0.3)).reshape(8, 64)
    assert (sides == sides[0]).all()
    assert 0.1 < sides[0].mean() < 0.5
    assert chosen(drawings[:2], ["a/x.png", "a/b/x.png"], group="folder", eval_fraction=0) == [False, False]


def test_nothing_and_the_same_picture(drawings: list[Thumbnail]) -> None:
    assert chosen([]) == []
    assert not any(chosen(drawings, eval_fraction=0))
    for salt in range(50):
        assert len(set(chosen([drawings[0]] * 5, eval_fraction=0.5, salt=str(salt)))) == 1


@pytest.mark.parametrize("fraction", [0.02, 0.5])
def test_twenty_thousand_pictures_take_no_time(fraction: float) -> None:
    rng = np.random.default_rng(0)
    thumbnails = list(rng.integers(0, 256, (20_000, 8, 9, 3), dtype=np.uint8))
    started_s = time.process_time()
    sides = chosen(thumbnails, eval_fraction=fraction)
    assert time.process_time() - started_s < 3
    assert np.mean(sides) == pytest.approx(fraction, abs=0.02)
