"""A picture fitted to a size: covered, cut in the middle, one resize. Decoding is tested where crops are cut."""

import numpy as np
import pytest
from PIL import Image

from shared.pictures import cover


def ramp(height: int, width: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    y, x = np.mgrid[0:height, 0:width]
    channels = (x * 255 // (width - 1), y * 255 // (height - 1), 0 * x)
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


@pytest.mark.parametrize("hw", [(64, 64), (64, 128), (96, 40), (300, 900)])
@pytest.mark.parametrize("size", [(100, 100), (50, 200), (301, 77)])
def test_it_is_resize_then_cut_in_the_middle(hw: tuple[int, int], size: tuple[int, int]) -> None:
    image = ramp(*size)
    ours = cover(image, hw)
    assert ours.shape == (*hw, 3)
    scale = max(hw[0] / size[0], hw[1] / size[1])
    whole = image.resize((round(size[1] * scale), round(size[0] * scale)), Image.Resampling.LANCZOS)
    left, top = (whole.width - hw[1]) // 2, (whole.height - hw[0]) // 2
    theirs = np.asarray(whole.crop((left, top, left + hw[1], top + hw[0])))
    assert np.abs(ours.astype(int) - theirs).mean() < 2


def test_the_same_size_is_the_same_picture() -> None:
    image = ramp(64, 96)
    assert np.array_equal(cover(image, (64, 96)), np.asarray(image))
