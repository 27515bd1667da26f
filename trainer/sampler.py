"""Which samples in which order: a pure function of (seed, position), so that a resumed run needs no saved state.

Each bucket is an endless stream, one permutation of its items per epoch after another, cut into pieces of b items.
Remainders carry over into the next epoch, so no micro-batch is short, padded or dropped, and over the epochs every item
comes as often as its weight says. In each epoch the pieces that end in it are shuffled over all buckets.

    before epoch e, an item of weight w has come  floor(w e + u)  times, u in [0, 1) its own   (whole weights: w e);
    a bucket has given N(e) items, the sum of those; epoch e has its pieces  floor(N(e) / b) ... floor(N(e + 1) / b) - 1

Of an epoch one permutation of each bucket is held, 4 bytes an item, and of those before it what was left over.

So of a weight's fraction nothing is left to chance but the epoch in which it counts: over any k epochs an item comes
w k times, give or take less than one.
"""

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.errors import DataError
from shared.seeding import make_permutation, make_uniform
from trainer.packed_rows import PackedRows

Indices = np.ndarray[Any, np.dtype[Any]]  # integers: of 4 bytes where that is enough, or ten million are 80 MB
Weights = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Pool:
    """What is drawn from in one bucket: an item is a row, or a row with one of its captions."""

    hw: tuple[int, int]  # pixels
    rows: Indices | PackedRows  # [n] rows of the manifest, ascending
    captions: Indices | None = None  # [n] which of its row's captions an item shows; None: drawn when it is read
    weights: Weights | None = None  # [n] times an epoch; None: once each
    partition: int = 0  # of the run's partitions (trainer/partitions.py)


@dataclass(frozen=True)
class MicroBatch:
    """b items of one bucket, and where in the run they stand: their draws are labelled by (epoch, position)."""

    bucket_hw: tuple[int, int]  # pixels
    rows: tuple[int, ...]
    epoch: int
    first_position: int  # of rows[0], counted in samples from the start of the epoch
    captions: tuple[int, ...] | None = None  # which caption of each row; None: drawn when it is read
    partition: int = 0  # that the bucket is of

    def places(self) -> list[tuple[int, int]]:
        """(epoch, position) of each row."""
        return [(self.epoch, self.first_position + i) for i in range(len(self.rows))]


class Order:
    """The endless sequence of micro-batches over `pools`; its first epoch is called `first_epoch`."""

    def __init__(self, pools: Sequence[Pool], batch: int, seed: int, first_epoch: int = 0) -> None:
        """Raises DataError where there is nothing to train on."""
        self._pools = [pool for pool in pools if len(pool.rows) and (pool.weights is None or pool.weights.any())]
        if not self._pools:
            raise DataError("the manifest holds no sample to train on: all are held out (split.eval_fraction)")
        self._batch, self._seed, self._first_epoch = batch, seed, first_epoch
        # Caches of pure functions: epochs are gone through one after another.
        self._items_before = functools.lru_cache(maxsize=64 * len(self._pools))(self._count_items)
        self._shuffled = functools.lru_cache(maxsize=1)(self._shuffle_pieces)
        self._permuted = functools.lru_cache(maxsize=len(self._pools))(self._permute_items)
        self._left_over = functools.lru_cache(maxsize=64 * len(self._pools))(self._last_items)

    def epoch_start(self, epoch: int) -> int:
        """Number of micro-batches before `epoch` (counted from 0, whatever it is called)."""
        return sum(self._items_before(index, epoch) // self._batch for index in range(len(self._pools)))

    def epoch_of(self, index: int) -> int:
        """The epoch (counted from 0) that micro-batch `index` stands in."""
        low, high = 0, 1
        while self.epoch_start(high) <= index:
            low, high = high, 2 * high
        return low - 1 + bisect.bisect_right(range(low, high), index, key=self.epoch_start)

    def __getitem__(self, index: int) -> MicroBatch:
        """Micro-batch `index`, counted from 0."""
        epoch = self.epoch_of(index)
        place = index - self.epoch_start(epoch)
        number, piece = self._piece(epoch, place)
        pool, items = self._pools[number], self._items(number, epoch, piece)
        captions = None if pool.captions is None else tuple(pool.captions[items].tolist())
        rows = tuple(pool.rows[items].tolist())
        return MicroBatch(pool.hw, rows, self._first_epoch + epoch, place * self._batch, captions, pool.partition)

    def _count_items(self, number: int, epoch: int) -> int:
        """Items that pool `number` has given before `epoch`."""
        return int(self._times(number, epoch).sum()) if self._is_weighted(number) else len(self._rows(number)) * epoch

    def _times(self, number: int, epoch: int) -> Indices:
        """How often each item of a weighted pool has come before `epoch`."""
        weights, hw = self._pools[number].weights, self._pools[number].hw
        assert weights is not None
        times: Indices = np.floor(weights * epoch + make_uniform(self._seed, "weight", *hw, length=len(weights)))
        return times.astype(np.int64)

    def _is_weighted(self, number: int) -> bool:
        return self._pools[number].weights is not None

    def _rows(self, number: int) -> Indices | PackedRows:
        return self._pools[number].rows

    def _first_piece(self, number: int, epoch: int) -> int:
        return self._items_before(number, epoch) // self._batch

    def _piece(self, epoch: int, place: int) -> tuple[int, int]:
        """The pool and the number of the piece at `place` of `epoch`."""
        order, ends = self._shuffled(epoch)
        flat = int(order[place])
        number = int(np.searchsorted(ends, flat, side="right"))
        return number, self._first_piece(number, epoch + 1) - (int(ends[number]) - flat)

    def _shuffle_pieces(self, epoch: int) -> tuple[Indices, Indices]:
        """A permutation of the pieces of all pools that end in `epoch`, and where each pool's end before it."""
        numbers = range(len(self._pools))
        counts = [self._first_piece(number, epoch + 1) - self._first_piece(number, epoch) for number in numbers]
        order = make_permutation(self._seed, "buckets", self._first_epoch + epoch, length=sum(counts))
        return order, np.cumsum(counts)

    def _items(self, number: int, epoch: int, piece: int) -> Indices:
        """Items piece * b ... of the pool's stream; the last is of `epoch`, the first may be of one before it."""
        first, end = piece * self._batch, (piece + 1) * self._batch
        starts = self._items_before(number, epoch)
        parts: list[Indices] = [self._permuted(number, epoch)[max(first, starts) - starts : end - starts]]
        while (end := min(end, starts)) > first:
            epoch -= 1
            starts = self._items_before(number, epoch)
            if end > starts:
                left_over = self._left_over(number, epoch)  # it ends where the epoch does
                parts.insert(0, left_over[-(end - max(first, starts)) :])
        return np.concatenate(parts)

    def _last_items(self, number: int, epoch: int) -> Indices:
        """What a piece that ends in a later epoch may have of this one; a copy, so that the rest can go."""
        return self._permute_items(number, epoch)[-self._batch :].copy()

    def _permute_items(self, number: int, epoch: int) -> Indices:
        labels = ("rows", *self._pools[number].hw, self._first_epoch + epoch)
        if not self._is_weighted(number):
            return make_permutation(self._seed, *labels, length=len(self._rows(number)))
        times = self._times(number, epoch + 1) - self._times(number, epoch)
        items = np.repeat(np.arange(len(times)), times)
        permuted: Indices = items[make_permutation(self._seed, *labels, length=len(items))]
        return permuted
