"""Rows of a manifest by bucket: sorted as they are, a bucket is a few runs of rows, and nothing of it is held."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Bucket:
    """The rows of one split in one bucket, which are looked for when they are asked for: ten million take 80 MB."""

    hw: tuple[int, int]  # pixels
    _runs: tuple[tuple[int, int], ...]  # rows of the bucket, of either split, from ... to
    _split: np.ndarray[Any, np.dtype[np.int8]]  # of every row
    _wanted: int

    def __len__(self) -> int:
        return sum(int(np.count_nonzero(self._split[start:end] == self._wanted)) for start, end in self._runs)

    @property
    def rows(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Which rows of the manifest they are, ascending."""
        found = [start + np.flatnonzero(self._split[start:end] == self._wanted) for start, end in self._runs]
        return np.concatenate(found)


def buckets_of(
    hw: np.ndarray[Any, np.dtype[np.int32]], split: np.ndarray[Any, np.dtype[np.int8]], wanted: int
) -> list[Bucket]:
    """The buckets that have rows of the split `wanted`, smallest first; hw is int32 [rows, 2], split int8 [rows]."""
    runs: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for start, end in _runs_of(hw):
        runs.setdefault((int(hw[start, 0]), int(hw[start, 1])), []).append((start, end))
    found = [Bucket(size, tuple(of), split, wanted) for size, of in sorted(runs.items())]
    return [bucket for bucket in found if len(bucket)]


def _runs_of(hw: np.ndarray[Any, np.dtype[np.int32]]) -> list[tuple[int, int]]:
    """From where to where equal rows of `hw` follow each other."""
    both = np.ascontiguousarray(hw).view(np.int64).reshape(-1)  # h and w as one number
    starts = np.flatnonzero(both[1:] != both[:-1]) + 1
    edges = [0, *starts.tolist(), len(both)] if len(both) else []
    return list(itertools.pairwise(edges))
