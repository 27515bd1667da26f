"""Rows of a manifest as a build of millions would give them, made up as they are asked for and never held.

In order, with ids and keys as evenly spread as digests are, one crop and one caption each, a fiftieth held out.
"""

from collections.abc import Iterator

import numpy as np

from shared.manifest_rows import ManifestRow, ManifestSettings, Variant
from tests.stores import settings

AT_ONCE = 4096
STEP_PX, EDGES_PX = 64, range(704, 1472, 64)  # of buckets near 1024 x 1024
BUCKETS_HW = [(h, STEP_PX * round(1024 * 1024 / h / STEP_PX)) for h in EDGES_PX]
HELD_OUT = 50


def settings_of() -> ManifestSettings:
    """What a build of SDXL's parts declares."""
    return settings(("generated",), text_widths=(768, 1280), pooled_width=1280, prompts={})


class GeneratedRows:
    """`count` rows, the same each time they are gone through."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[ManifestRow]:
        share, rest = divmod(self._count, len(BUCKETS_HW))
        for number, hw in enumerate(BUCKETS_HW):
            yield from _rows(number, hw, share + (number < rest))


def _rows(bucket: int, hw: tuple[int, int], count: int) -> Iterator[ManifestRow]:
    for first in range(0, count, AT_ONCE):
        block = _random(bucket, first // AT_ONCE).tobytes()
        for index in range(first, min(first + AT_ONCE, count)):
            at = 80 * (index - first)
            yield ManifestRow(
                dataset="generated",
                sample_id=((index << 32) // count).to_bytes(4, "big") + index.to_bytes(8, "big") + bytes(4),
                path=f"shard-{index // 10000:05d}-{bucket:02d}/{index:09d}.jpg",
                image_digest=block[at + 32 : at + 64],
                original_hw=(hw[0] + 500, hw[1] + 500),
                bucket_hw=hw,
                variants=(Variant(block[at : at + 16], False, (0, index % 64), hw),),
                text_keys=(block[at + 16 : at + 32],),
                split="eval" if index % HELD_OUT == 7 else "train",
            )


def _random(bucket: int, block: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Random bytes [AT_ONCE, 80] of one stretch of samples."""
    bits = np.random.Generator(np.random.Philox(key=bucket << 32 | block))
    return np.frombuffer(bits.bytes(AT_ONCE * 80), np.uint8).reshape(AT_ONCE, 80)
