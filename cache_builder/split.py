"""Which samples are held out: by the hash of a group, so that builds agree; near copies fall on one side.

A picture's group is its 64-bit difference hash, which rescaling and recompression change by a few bits. So whatever
lies within NEAR_BITS of a held-out hash and looks the same is held out too.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from cache_builder.config import SplitRules
from cache_builder.key_arrays import parts
from cache_builder.pixels import difference_hashes
from shared.scratch import Column

# Copies at 50 to 90 % of the size, as JPEG of quality 60 to 90, or both, of 1,300 photo-like pictures, clip art, line
# art and sketches of 64 px and more: at most 5 bits, 4.2 levels, and 0.5 levels + 0.19 of the contrast; of 300 shapes
# on soft gradients, whose neighbours differ by just about the margin, up to 14 bits. So bits only choose whom to
# compare, and thumbnails decide. Without the share of contrast, sketches on white are all alike: it takes the pairs
# that are not copies from 21,000 to 760 in 1,000 sketches.
NEAR_BITS = 16
NEAR_LEVELS = 4.5  # mean difference between two thumbnails, of 255
NEAR_NOISE, NEAR_SHARE = 0.5, 0.2  # levels, and of the contrast of the flatter one
ROUNDING = 1e-3  # levels; more than what float32 means of bytes are off by

AT_ONCE = 1024  # thumbnails; what is worked out of them is much larger
THUMBNAIL_HWC = (8, 9, 3)
THUMBNAIL_BYTES = 8 * 9 * 3
Thumbnail = bytes
"""Pixels of one, row by row."""
Thumbnails = np.ndarray[Any, np.dtype[np.uint8]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


def held_out(rules: SplitRules, paths: Iterable[str], thumbs: Thumbnails, folder: Path | None = None) -> Flags:
    """For each sample, by its path and thumbnail [N, 8, 9, 3], whether it is held out of training.

    What is worked out of all thumbnails lies in unnamed files in `folder`.
    """
    if rules.group == "folder":
        return np.array([_chosen(rules, str(PurePosixPath(path).parent).encode()) for path in paths], bool)
    hashes = _by_parts(len(thumbs), np.uint64, folder, lambda part: difference_hashes(thumbs[part]))
    chosen = np.fromiter((_chosen(rules, int(value).to_bytes(8, "big")) for value in hashes), bool, len(hashes))
    if chosen.any():
        _follow_near_copies(chosen, hashes, thumbs, folder)
    return chosen


def _chosen(rules: SplitRules, group: bytes) -> bool:
    message = rules.salt.encode() + b"\0" + group
    draw = int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "big") / 2**64
    return draw < rules.eval_fraction


def _follow_near_copies(
    chosen: Flags,  # [N], changed in place
    hashes: np.ndarray[Any, np.dtype[np.uint64]],  # [N]
    thumbs: Thumbnails,  # [N, 8, 9, 3]
    folder: Path | None,
) -> None:
    """Hold out what is a near copy of something held out, and its near copies in turn.

    Copies are alike in brightness too, so only a window of all pictures in order of brightness is looked at.
    """
    count = len(thumbs)
    brightness = _by_parts(count, np.float32, folder, lambda part: _mean(thumbs[part]).mean(axis=1))
    order = np.argsort(brightness, kind="stable").astype(np.uint32)
    place = np.empty_like(order)
    place[order] = np.arange(count, dtype=np.uint32)
    brightness, hashes = brightness[order], hashes[order]
    mean = _by_parts(count, np.dtype((np.float32, 3)), folder, lambda part: _mean(thumbs[order[part]]))
    alike = _by_parts(count, np.float32, folder, lambda part: _alike(thumbs[part]))
    frontier = list(np.flatnonzero(chosen))
    while frontier:
        index = frontier.pop()
        at, reach = place[index], alike[index] + ROUNDING
        first, last = np.searchsorted(brightness, (brightness[at] - reach, brightness[at] + reach))
        # Bits first: a window grows with the data set, and they cost a tenth of what the means do.
        near = first + np.flatnonzero(np.bitwise_count(hashes[first:last] ^ hashes[at]) <= NEAR_BITS)
        near = order[near[np.abs(mean[near] - mean[at]).mean(axis=1) <= reach]]
        near = near[~chosen[near]]
        for some in parts(near, AT_ONCE):
            difference = np.abs(thumbs[some].astype(np.int16) - thumbs[index]).mean(axis=(1, 2, 3))
            copies = some[difference <= np.minimum(alike[some], alike[index])]
            chosen[copies] = True
            frontier += list(copies)


def _alike(thumbs: Thumbnails) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Up to what mean difference each of them, [N], is the same as another."""
    contrast = np.abs(thumbs - _mean(thumbs)[:, None, None]).mean((1, 2, 3))
    return np.asarray(np.minimum(NEAR_LEVELS, NEAR_NOISE + NEAR_SHARE * contrast))


def _mean(thumbs: Thumbnails) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Mean colour of each thumbnail, [N, 3]: a product of matrices, exact in float32, in a tenth of mean's time."""
    pixels = thumbs.shape[1] * thumbs.shape[2]
    summing = np.tile(np.eye(3, dtype=np.float32), (pixels, 1))
    return (thumbs.reshape(len(thumbs), -1).astype(np.float32) @ summing) / np.float32(pixels)


def _by_parts(
    count: int, dtype: Any, folder: Path | None, work: Callable[[slice], np.ndarray[Any, Any]]
) -> np.ndarray[Any, Any]:
    """[count, ...] of work(part), outside of memory: some at once, for what it works out is much larger."""
    found = Column(dtype, folder)
    for first in range(0, count, AT_ONCE):
        found.append(work(slice(first, min(first + AT_ONCE, count))).astype(found.dtype.base).tobytes())
    return found.array
