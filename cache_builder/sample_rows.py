"""What stands in the columns that samples are kept in, as Python has it, as it is packed, and as numpy sees it.

scan.py packs crops, samples.py all the rest; whoever works on whole columns finds their fields here
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cache_builder.buckets import CropPlan
from cache_builder.key_arrays import KEY_DTYPE
from cache_builder.split import THUMBNAIL_HWC
from shared.pictures import PixelLimits, PixelRules
from shared.record import KEY_BYTES

ROW = struct.Struct("<32s16sIIIIQIQIQI??")
ROW_DTYPE = np.dtype(
    [("digest", "<u8", 4), ("facts_key", KEY_DTYPE), ("original_hw", "<u4", 2), ("source", "<u4"), ("reader", "<u4")]
    + [(name + part, kind) for name in ("crop", "text", "word") for part, kind in (("s", "<u8"), ("_count", "<u4"))]
    + [("is_sided", "?"), ("has_meta", "?")]
)  # fmt: skip
CROP = struct.Struct("<16s6I?")
CROP_DTYPE = np.dtype(
    [("key", KEY_DTYPE), ("resize_hw", "<u4", 2), ("corner", "<u4", 2), ("target_hw", "<u4", 2), ("flip", "?")]
)
TEXT = struct.Struct("<16sQI")
TEXT_DTYPE = np.dtype([("key", KEY_DTYPE), ("at", "<u8"), ("length", "<u4")])
FACTS_DTYPE = np.dtype([("is_known", "?"), ("thumbnail", "u1", THUMBNAIL_HWC)])
NO_FACTS = bytes(FACTS_DTYPE.itemsize)


@dataclass(frozen=True, slots=True)
class PlannedCrop:
    """One crop of a picture and the key of its latents."""

    plan: CropPlan
    latent_key: bytes


@dataclass(frozen=True, slots=True)
class DataSet:
    """What the samples of one data set have in common."""

    id: str
    rules: PixelRules
    limits: PixelLimits


class Row(NamedTuple):
    """A row as Python has it."""

    digest: bytes
    facts_key: bytes
    height: int
    width: int
    source: int
    reader: int
    crops: int
    crop_count: int
    texts: int
    text_count: int
    words: int
    word_count: int
    is_sided: bool
    has_meta: bool

    def its_texts(self) -> range:
        """Which of the texts are its captions."""
        return range(self.texts, self.texts + self.text_count)


def packed(plan: CropPlan) -> bytes:
    """What follows the key of a crop in its column."""
    return CROP.pack(bytes(KEY_BYTES), *plan_numbers(plan))[KEY_BYTES:]


def plan_numbers(plan: CropPlan) -> tuple[int, ...]:
    """A plan as the numbers that `unpacked` takes."""
    return *plan.resize_hw, plan.box_top, plan.box_left, *plan.target_hw, plan.flip


def unpacked(numbers: Sequence[int]) -> CropPlan:
    """The plan that was packed as these numbers."""
    resize_h, resize_w, top, left, target_h, target_w, flip = numbers
    return CropPlan((resize_h, resize_w), top, left, (target_h, target_w), bool(flip))
