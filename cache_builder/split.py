"""Which samples are held out: by the hash of a group, so that builds agree; near copies fall on one side.

A picture's group is its 64-bit difference hash, which rescaling and recompression change by a few bits. So whatever
lies within NEAR_BITS of a held-out hash and looks the same is held out too.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from cache_builder.config import SplitRules
from cache_builder.pixels import difference_hashes

# Copies at 50 to 90 % of the size, as JPEG of quality 60 to 90, or both, of 1,300 photo-like pictures, clip art, line
# art and sketches of 64 px and more: at most 5 bits, 4.2 levels, and 0.5 levels + 0.19 of the contrast; of 300 shapes
# on soft gradients, whose neighbours differ by just about the margin, up to 14 bits. So bits only choose whom to
# compare, and thumbnails decide. Without the share of contrast, sketches on white are all alike: it takes the pairs
# that are not copies from 21,000 to 760 in 1,000 sketches.
NEAR_BITS = 16
NEAR_LEVELS = 4.5  # mean difference between two thumbnails, of 255
NEAR_NOISE, NEAR_SHARE = 0.5, 0.2  # levels, and of the contrast of the flatter one
ROUNDING = 1e-3  # levels; more than what float32 means of bytes are off by

THUMBNAIL_HWC = (8, 9, 3)
THUMBNAIL_BYTES = 8 * 9 * 3
Thumbnail = bytes
"""Pixels of one, row by row: bytes, because a million small arrays take several times the memory."""
Thumbnails = np.ndarray[Any, np.dtype[np.uint8]]


def held_out(rules: SplitRules, paths: Sequence[str], thumbnails: Sequence[Thumbnail]) -> list[bool]:
    """For each sample, by its path and thumbnail, whether it is held out of training."""
    if rules.group == "folder":
        return [_chosen(rules, str(PurePosixPath(path).parent).encode()) for path in paths]
    if not thumbnails:
        return []
    thumbs = np.frombuffer(b"".join(thumbnails), np.uint8).reshape(-1, *THUMBNAIL_HWC)
    hashes = np.concatenate([difference_hashes(part) for part in _parts(thumbs)])
    chosen = np.array([_chosen(rules, value.to_bytes(8, "big")) for value in hashes.tolist()], bool)
    if chosen.any():
        _follow_near_copies(chosen, hashes, thumbs)
    return [bool(is_held_out) for is_held_out in chosen]


def _chosen(rules: SplitRules, group: bytes) -> bool:
    message = rules.salt.encode() + b"\0" + group
    draw = int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "big") / 2**64
    return draw < rules.eval_fraction


def _follow_near_copies(
    chosen: np.ndarray[Any, np.dtype[np.bool_]],  # [N], changed in place
    hashes: np.ndarray[Any, np.dtype[np.uint64]],  # [N]
    thumbs: Thumbnails,  # [N, 8, 9, 3]
) -> None:
    """Hold out what is a near copy of something held out, and its near copies in turn.

    Copies are alike in brightness too, so only a window of all pictures in order of brightness is looked at.
    """
    mean = np.concatenate([_mean(part) for part in _parts(thumbs)])  # [N, 3]
    contrast = np.concatenate([np.abs(part - _mean(part)[:, None, None]).mean((1, 2, 3)) for part in _parts(thumbs)])
    alike = np.minimum(NEAR_LEVELS, NEAR_NOISE + NEAR_SHARE * contrast)
    order = np.argsort(mean.mean(axis=1), kind="stable")
    brightness, mean, hashes = mean.mean(axis=1)[order], mean[order], hashes[order]
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    frontier = list(np.flatnonzero(chosen))
    while frontier:
        index = frontier.pop()
        at, reach = place[index], alike[index] + ROUNDING
        first, last = np.searchsorted(brightness, (brightness[at] - reach, brightness[at] + reach))
        # Bits first: a window grows with the data set, and they cost a tenth of what the means do.
        near = first + np.flatnonzero(np.bitwise_count(hashes[first:last] ^ hashes[at]) <= NEAR_BITS)
        near = order[near[np.abs(mean[near] - mean[at]).mean(axis=1) <= reach]]
        near = near[~chosen[near]]
        difference = np.abs(thumbs[near].astype(np.int16) - thumbs[index]).mean(axis=(1, 2, 3))
        copies = near[difference <= np.minimum(alike[near], alike[index])]
        chosen[copies] = True
        frontier += list(copies)


def _mean(thumbs: Thumbnails) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Mean colour of each thumbnail, [N, 3]: a product of matrices, exact in float32, in a tenth of mean's time."""
    pixels = thumbs.shape[1] * thumbs.shape[2]
    summing = np.tile(np.eye(3, dtype=np.float32), (pixels, 1))
    return (thumbs.reshape(len(thumbs), -1).astype(np.float32) @ summing) / np.float32(pixels)


def _parts(thumbs: Thumbnails) -> Iterator[Thumbnails]:
    """A few thousand at once: what is worked out of them is much larger than they are."""
    return (thumbs[first : first + 4096] for first in range(0, len(thumbs), 4096))
