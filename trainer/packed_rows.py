"""Rows of a manifest in little memory: a bit for each, where numbers of 8 bytes would be 80 MB for ten million.

rows of a bucket -> PackedRows -> trainer/sampler.py, which asks for a few of them at once
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

STRETCH = 4096  # rows of the manifest that have their bits together
UNPACKED = 4  # stretches that stay unpacked, 32 KB each: all of a small bucket

Numbers = np.ndarray[Any, np.dtype[Any]]


class PackedRows:
    """Rows that ascend, once each; `[items]` gives those at some places among them, as an array would."""

    def __init__(self, rows: Numbers) -> None:
        self._rows = functools.lru_cache(maxsize=UNPACKED)(self._unpack)
        stretches = rows // STRETCH
        first = np.flatnonzero(np.diff(stretches, prepend=-1))  # of each stretch that has any
        self._stretches = stretches[first].astype(np.int64)
        self._before = np.append(first, len(rows)).astype(np.int64)
        self._bits = np.empty((len(first), STRETCH // 8), np.uint8)
        for i, (start, end) in enumerate(zip(self._before, self._before[1:], strict=False)):
            flags = np.zeros(STRETCH, np.bool_)
            flags[rows[start:end] - self._stretches[i] * STRETCH] = True
            self._bits[i] = np.packbits(flags)

    def __len__(self) -> int:
        return int(self._before[-1])

    def __getitem__(self, items: Sequence[int] | Numbers) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The rows at `items`, int64, in that order."""
        at = np.searchsorted(self._before, items, side="right") - 1
        picked = [self._rows(i)[item - self._before[i]] for i, item in zip(at, items, strict=True)]
        return np.array(picked, np.int64)

    def __iter__(self) -> Iterator[int]:
        for i in range(len(self._stretches)):
            yield from self._rows(i).tolist()

    def after(self, row: int) -> int:
        """The one that follows `row`; after the last comes the first."""
        at = int(np.searchsorted(self._stretches, row // STRETCH))
        for stretch in range(at, min(at + 2, len(self._stretches))):
            if len(later := self._rows(stretch)[self._rows(stretch) > row]):
                return int(later[0])
        return int(self._rows(0)[0])

    def _unpack(self, stretch: int) -> Numbers:
        rows: Numbers = np.flatnonzero(np.unpackbits(self._bits[stretch])) + self._stretches[stretch] * STRETCH
        return rows


def row_after(rows: Numbers | PackedRows, row: int) -> int:
    """The row that follows `row`, one of the ascending `rows`; after the last comes the first."""
    if isinstance(rows, PackedRows):
        return rows.after(row)
    return int(rows[int(rows.searchsorted(row, side="right")) % len(rows)])
