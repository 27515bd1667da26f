"""Parts of a manifest: which of its samples a machine holds, where the whole would not fit its disk.

A sample id is a digest, so its first 32 bits, h, are spread evenly. Part i of n is a stretch of them:

    h * n >> 32 == i

Stretches nest (part 1/4 lies in part 0/2), so any number of machines may divide a manifest again, and a part is read
from few shards that are sorted by h. A part holds whole samples: their crops and all their captions.
"""

import heapq
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from shared.errors import ConfigError
from shared.seeding import derive_seed

MOST_PARTS = 1 << 16
PINNED_SAMPLES = 256  # held-out samples that every part has: a run is scored on them
_WRITTEN = re.compile(r"(\d{1,6})/(\d{1,6})")

Heads = np.ndarray[Any, np.dtype[np.uint32]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True, order=True)
class Part:
    """Part `index` (from 0) of `count`; raises ConfigError where there is no such part."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count <= MOST_PARTS:
            raise ConfigError(f"part {self}: parts are 0/N to N-1/N, of at most {MOST_PARTS}")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def holds(self, heads: Heads) -> Mask:
        """Whether the samples whose ids begin with `heads` belong to it."""
        mask: Mask = part_of(heads, self.count) == self.index
        return mask


def part_of(heads: Heads, count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Which of `count` parts the samples belong to whose ids begin with `heads`."""
    numbers: np.ndarray[Any, np.dtype[np.uint64]] = (heads.astype(np.uint64) * np.uint64(count)) >> np.uint64(32)
    return numbers


def parse_part(text: str) -> Part:
    """The part that "i/n" names; raises ConfigError."""
    if not (found := _WRITTEN.fullmatch(text.strip())):
        raise ConfigError(f"part {text!r}: write i/n, for example 0/4 for the first of four")
    return Part(int(found[1]), int(found[2]))


def joined_parts(parts: Iterable[Part]) -> tuple[Part, ...]:
    """`parts` without those that lie in others, sorted; () where together they are the whole."""
    kept = sorted(set(parts))
    for part in list(kept):
        others = [other for other in kept if other != part]
        kept = others if covers(others, part) else kept
    return () if covers(kept, Part(0, 1)) else tuple(kept)


def covers(parts: Sequence[Part], wanted: Part) -> bool:
    """Whether every sample of `wanted` lies in one of `parts`."""
    at, end = Fraction(wanted.index, wanted.count), Fraction(wanted.index + 1, wanted.count)
    for part in sorted(parts, key=lambda part: Fraction(part.index, part.count)):
        if Fraction(part.index, part.count) <= at:
            at = max(at, Fraction(part.index + 1, part.count))
    return at >= end


def in_any(parts: Sequence[Part], heads: Heads) -> Mask:
    """Whether samples belong to one of `parts`."""
    mask: Mask = np.zeros(len(heads), np.bool_)
    for part in parts:
        mask |= part.holds(heads)
    return mask


def eval_order(sample_ids: Sequence[bytes], count: int) -> list[int]:
    """Indices of the held-out samples that runs are scored on, `count` at most: the first by a hash of their ids."""
    return heapq.nsmallest(
        count, range(len(sample_ids)), lambda i: (derive_seed(0, "eval sample", sample_ids[i]), sample_ids[i])
    )
