"""Which samples in which order: a pure function of (seed, position), so that a resumed run needs no saved state.

Each bucket is an endless stream, one permutation of its rows per epoch after another, cut into pieces of b rows.
Remainders carry over into the next epoch, so no micro-batch is short, padded or dropped, and over the epochs every row
comes equally often. In each epoch the pieces that end in it are shuffled over all buckets.

    epoch e has, of a bucket of n rows, the pieces floor(n e / b) ... floor(n (e + 1) / b) - 1
"""

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.errors import DataError
from shared.manifest import Bucket
from shared.seeding import make_permutation

Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class MicroBatch:
    """b rows of one bucket, and where in the run they stand: their draws are labelled by (epoch, position)."""

    bucket_hw: tuple[int, int]  # pixels
    rows: tuple[int, ...]
    epoch: int
    first_position: int  # of rows[0], counted in samples from the start of the epoch

    def places(self) -> list[tuple[int, int]]:
        """(epoch, position) of each row."""
        return [(self.epoch, self.first_position + i) for i in range(len(self.rows))]


class Order:
    """The endless sequence of micro-batches over `buckets`; its first epoch is called `first_epoch`."""

    def __init__(self, buckets: Sequence[Bucket], batch: int, seed: int, first_epoch: int = 0) -> None:
        """Raises DataError where there is no row to train on."""
        self._buckets = [bucket for bucket in buckets if len(bucket.rows)]
        if not self._buckets:
            raise DataError("the manifest holds no sample to train on: all are held out (split.eval_fraction)")
        self._batch, self._seed, self._first_epoch = batch, seed, first_epoch
        self._pieces_of_epoch = functools.lru_cache(maxsize=2)(self._shuffled_pieces)
        self._permutation = functools.lru_cache(maxsize=2 * len(self._buckets))(self._permuted_rows)

    def epoch_start(self, epoch: int) -> int:
        """Number of micro-batches before `epoch` (counted from 0, whatever it is called)."""
        return sum(len(bucket.rows) * epoch // self._batch for bucket in self._buckets)

    def epoch_of(self, index: int) -> int:
        """The epoch (counted from 0) that micro-batch `index` stands in."""
        total = sum(len(bucket.rows) for bucket in self._buckets)
        # Each bucket lags its exact share by less than one piece, so the epoch is within this bracket.
        low = index * self._batch // total
        high = (index + 1 + len(self._buckets)) * self._batch // total + 1
        return low - 1 + bisect.bisect_right(range(low, high + 1), index, key=self.epoch_start)

    def __getitem__(self, index: int) -> MicroBatch:
        """Micro-batch `index`, counted from 0."""
        epoch = self.epoch_of(index)
        place = index - self.epoch_start(epoch)
        bucket, piece = self._pieces_of_epoch(epoch)[place]
        return MicroBatch(
            self._buckets[bucket].hw,
            tuple(int(row) for row in self._rows(bucket, piece)),
            self._first_epoch + epoch,
            place * self._batch,
        )

    def _shuffled_pieces(self, epoch: int) -> list[tuple[int, int]]:
        pieces = [
            (index, piece)
            for index, bucket in enumerate(self._buckets)
            for piece in range(len(bucket.rows) * epoch // self._batch, len(bucket.rows) * (epoch + 1) // self._batch)
        ]
        order = make_permutation(self._seed, "buckets", self._first_epoch + epoch, length=len(pieces))
        return [pieces[i] for i in order]

    def _rows(self, bucket: int, piece: int) -> Indices:
        """Rows piece * b ... of the bucket's stream, which may run over the end of an epoch."""
        count = len(self._buckets[bucket].rows)
        stream = np.arange(piece * self._batch, (piece + 1) * self._batch)
        epochs, places = np.divmod(stream, count)
        parts = [self._permutation(bucket, int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate(parts)

    def _permuted_rows(self, bucket: int, epoch: int) -> Indices:
        own = self._buckets[bucket]
        labels = ("rows", *own.hw, self._first_epoch + epoch)
        permuted: Indices = own.rows[make_permutation(self._seed, *labels, length=len(own.rows))]
        return permuted
