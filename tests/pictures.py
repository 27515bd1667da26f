"""Pictures for tests: drawn ones with captions that can be counted, and what a build does with pixels in an array."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cache_builder.buckets import CropPlan
from cache_builder.pixels import Picture
from demo import shapes
from shared.pictures import PixelRules

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def crop(pixels: Pixels, plan: CropPlan, rules: PixelRules) -> Pixels:
    """Picture.crop of `pixels` [h, w, 3], writable."""
    return np.array(Picture(Image.fromarray(pixels)).crop(plan, rules))


def thumbnail(pixels: Pixels) -> Pixels:
    """Picture.thumbnail of `pixels` [h, w, 3]."""
    return Picture(Image.fromarray(pixels)).thumbnail()


def write_shapes(out: Path, count: int = 512, seed: int = 0) -> Path:
    """`demo.shapes.write_shapes` with one caption a picture, and a second one for every third."""
    shapes.write_shapes(out, count=count, seed=seed)
    for index in range(count):
        sidecar = out / f"shape-{index:05d}.txt"
        lines = sidecar.read_text(encoding="utf-8").splitlines()
        sidecar.write_text("\n".join(lines[: 2 if index % 3 == 0 else 1]) + "\n", encoding="utf-8")
    return out
