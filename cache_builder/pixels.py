"""Pictures to the crops that the VAE sees, and to what tells near copies; shared/pictures.py decodes them.

bytes -> read_size -> (buckets.plan_crop) -> decode_picture -> crop -> encode.py
                                                 \\-> thumbnail -> difference_hashes -> the split, near copies

What a crop is depends on picture, plan and PixelRules alone; a change that alters it raises PIXELS_VERSION.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from cache_builder.buckets import CropPlan
from shared.pictures import PixelLimits, PixelRules, Pixels, decode_image

HASH_MARGIN = 2  # levels of luma; less is noise of compression, so that flat areas keep their bits

_RESAMPLE = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}
_LUMA = np.array([299, 587, 114])  # thousandths


@dataclass(frozen=True)
class Picture:
    """A decoded picture, upright sRGB, in Pillow's own memory: cutting crops out of it copies no whole picture."""

    image: Image.Image

    @property
    def size_hw(self) -> tuple[int, int]:
        """Of the upright picture."""
        return self.image.height, self.image.width

    def crop(self, plan: CropPlan, rules: PixelRules) -> Pixels:
        """Resized (antialiased), cut and mirrored by `plan`: uint8 [target_h, target_w, 3], C-contiguous."""
        (h, w), (resize_h, resize_w), (box_h, box_w) = self.size_hw, plan.resize_hw, plan.target_hw
        # The box in the source's own pixels: the same filter as resize-then-cut, without pixels that would be cut off.
        box = (
            plan.box_left * w / resize_w,
            plan.box_top * h / resize_h,
            min(w, (plan.box_left + box_w) * w / resize_w),
            min(h, (plan.box_top + box_h) * h / resize_h),
        )
        cut = np.asarray(self.image.resize((box_w, box_h), _RESAMPLE[rules.resample], box=box))
        return np.ascontiguousarray(cut[:, ::-1]) if plan.flip else cut

    def thumbnail(self) -> Pixels:
        """uint8 [8, 9, 3], read-only; nearly equal for copies of another size or compression."""
        # Bilinear: means over whole pixels (BOX) follow where the grid of pixels falls, by 7 levels in small copies.
        return np.asarray(self.image.resize((9, 8), Image.Resampling.BILINEAR, reducing_gap=16))


def decode_picture(data: bytes, rules: PixelRules, limits: PixelLimits) -> Picture:
    """Upright, sRGB, on the background colour, first frame; raises PictureError."""
    return Picture(decode_image(data, rules, limits))


def difference_hashes(thumbs: Pixels) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """64 bits of each thumbnail [N, 8, 9, 3], row by row: is each area clearly lighter than its left neighbour; [N]."""
    luma = thumbs.astype(np.int32) @ _LUMA.astype(np.int32)
    bits = luma[:, :, 1:] > luma[:, :, :-1] + HASH_MARGIN * int(_LUMA.sum())
    return np.packbits(bits.reshape(-1, 64), axis=1).view(">u8").reshape(-1).astype(np.uint64)
