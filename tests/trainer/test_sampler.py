"""The order of samples: nothing missed, nothing twice, and a function of the position alone."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import DataError
from trainer.sampler import MicroBatch, Order, Pool

Sizes = st.lists(st.integers(0, 13), min_size=1, max_size=5).filter(any)


def buckets_of(sizes: list[int]) -> list[Pool]:
    """Buckets whose rows lie apart and out of order with their neighbours', as in a manifest of several data sets."""
    numbers = iter(np.arange(sum(sizes)) * 3 + 5)
    return [
        Pool((64, 64 + 16 * i), np.array([next(numbers) for _ in range(size)], np.int64))
        for i, size in enumerate(sizes)
    ]


def first(order: Order, count: int) -> list[MicroBatch]:
    return [order[index] for index in range(count)]


@given(Sizes, st.integers(1, 9), st.integers(0, 5))
def test_over_k_epochs_every_row_comes_k_times_and_never_one_more(sizes: list[int], batch: int, seed: int) -> None:
    buckets, epochs = buckets_of(sizes), 4
    order = Order(buckets, batch, seed)
    end = order.epoch_start(epochs)
    counts = Counter(row for micro in first(order, end) for row in micro.rows)
    for bucket in buckets:
        seen = [counts[int(row)] for row in bucket.rows]
        assert not seen or max(seen) - min(seen) <= 1
        assert sum(seen) == len(bucket.rows) * epochs // batch * batch  # what is left over comes in the next epoch


@given(Sizes, st.integers(1, 9), st.integers(0, 5))
def test_a_bucket_is_a_stream_of_whole_permutations(sizes: list[int], batch: int, seed: int) -> None:
    buckets = buckets_of(sizes)
    order = Order(buckets, batch, seed)
    end = order.epoch_start(6)
    for bucket in (bucket for bucket in buckets if len(bucket.rows)):
        # Within an epoch pieces are shuffled, so the stream is taken from the pieces before that.
        index = [own.hw for own in order._pools].index(bucket.hw)
        pieces = len(bucket.rows) * 6 // batch
        ends = [-(-(piece + 1) * batch // len(bucket.rows)) - 1 for piece in range(pieces)]  # the epoch of its last row
        items = [order._items(index, epoch, piece) for piece, epoch in enumerate(ends)]
        stream = bucket.rows[np.concatenate(items)].tolist() if items else []
        for start in range(0, len(stream) - len(bucket.rows) + 1, len(bucket.rows)):
            assert sorted(stream[start : start + len(bucket.rows)]) == bucket.rows.tolist()
        drawn = [micro.rows for micro in first(order, end) if micro.bucket_hw == bucket.hw]
        assert sorted(drawn) == sorted(tuple(stream[i : i + batch]) for i in range(0, len(stream), batch))


@given(Sizes, st.integers(1, 9), st.integers(0, 5), st.integers(0, 3))
def test_every_micro_batch_is_full_of_one_bucket_and_labelled_once(
    sizes: list[int], batch: int, seed: int, first_epoch: int
) -> None:
    buckets = {bucket.hw: set(bucket.rows.tolist()) for bucket in buckets_of(sizes)}
    order = Order(buckets_of(sizes), batch, seed, first_epoch)
    micros = first(order, order.epoch_start(4))
    assert all(len(micro.rows) == batch and set(micro.rows) <= buckets[micro.bucket_hw] for micro in micros)
    places = [place for micro in micros for place in micro.places()]
    assert len(set(places)) == len(places)
    assert all(epoch >= first_epoch for epoch, _ in places)
    assert places == sorted(places)


@given(Sizes, st.integers(1, 20), st.integers(0, 60))
def test_epochs_begin_where_counting_says(sizes: list[int], batch: int, index: int) -> None:
    order = Order(buckets_of(sizes), batch, 0)
    starts = [0]
    while starts[-1] <= index:  # buckets smaller than a batch make epochs without a single piece
        epoch = len(starts)
        starts.append(sum(size * epoch // batch for size in sizes))
    assert [order.epoch_start(epoch) for epoch in range(len(starts))] == starts
    expected = max(epoch for epoch, start in enumerate(starts) if start <= index)
    assert order.epoch_of(index) == expected


@given(Sizes, st.integers(1, 9), st.integers(0, 99), st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_any_place_can_be_asked_for_first(sizes: list[int], batch: int, seed: int, asked: list[int]) -> None:
    sequential = first(Order(buckets_of(sizes), batch, seed), max(asked) + 1)
    at_random = Order(buckets_of(sizes), batch, seed)
    assert [at_random[index] for index in asked] == [sequential[index] for index in asked]


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    def epoch_rows(seed: int, epoch: int, first_epoch: int = 0) -> list[tuple[int, ...]]:
        order = Order(buckets_of([40, 24]), 4, seed, first_epoch)
        start, end = order.epoch_start(epoch), order.epoch_start(epoch + 1)
        return [order[index].rows for index in range(start, end)]

    drawn = [epoch_rows(0, 0), epoch_rows(0, 1), epoch_rows(0, 2), epoch_rows(1, 0)]
    assert all(a != b for i, a in enumerate(drawn) for b in drawn[:i])
    assert all(sorted(sum(a, ())) == sorted(sum(drawn[0], ())) for a in drawn)
    # 40 and 24 rows leave no remainder: an order that begins with epoch 2 draws what epoch 2 of another draws.
    assert epoch_rows(0, 0, first_epoch=2) == drawn[2]


def test_buckets_are_mixed_within_an_epoch() -> None:
    order = Order(buckets_of([400, 400]), 4, 0)
    sizes = [order[index].bucket_hw for index in range(200)]
    changes = sum(a != b for a, b in itertools.pairwise(sizes))
    assert 70 < changes < 130


Weights = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.3]), min_size=3, max_size=12).filter(any)


@given(Weights, st.integers(1, 7), st.integers(0, 9))
def test_over_k_epochs_an_item_comes_as_often_as_its_weight_says(weights: list[float], batch: int, seed: int) -> None:
    pools = [
        Pool((64, 64 + 16 * i), np.arange(len(own)) * 3 + 100 * i, None, np.array(own))
        for i, own in enumerate((weights, [1.0, 2.5]))
    ]
    order, epochs = Order(pools, batch, seed), 8
    drawn = first(order, order.epoch_start(epochs))
    assert all(len(micro.rows) == batch for micro in drawn)
    counts = Counter(row for micro in drawn for row in micro.rows)
    for pool in pools:
        assert pool.weights is not None
        given_items = sum(counts[int(row)] for row in pool.rows)
        assert abs(given_items - epochs * pool.weights.sum()) < batch + len(pool.rows)
        for row, weight in zip(pool.rows, pool.weights, strict=True):
            # Less than one for the fraction, and those of the last epoch that are left over for the next piece.
            assert -1 - min(batch, weight + 1) < counts[int(row)] - epochs * weight < 1


@given(Weights, st.integers(1, 7), st.integers(0, 9), st.integers(0, 30))
def test_weighted_orders_too_can_be_asked_for_any_place(
    weights: list[float], batch: int, seed: int, index: int
) -> None:
    def order() -> Order:
        return Order([Pool((64, 64), np.arange(len(weights)), None, np.array(weights))], batch, seed)

    assert order()[index] == first(order(), index + 1)[index]


def test_whole_weights_are_copies() -> None:
    rows = np.arange(10)
    twice = Order([Pool((64, 64), rows, None, np.full(10, 2.0))], 5, 0)
    for epoch in range(3):
        span = range(twice.epoch_start(epoch), twice.epoch_start(epoch + 1))
        assert Counter(row for index in span for row in twice[index].rows) == dict.fromkeys(range(10), 2)


def test_the_epochs_of_a_fraction_differ_from_item_to_item() -> None:
    half = Order([Pool((64, 64), np.arange(400), None, np.full(400, 0.5))], 1, 0)
    shown = [{half[i].rows[0] for i in range(half.epoch_start(e), half.epoch_start(e + 1))} for e in range(2)]
    assert 150 < len(shown[0]) < 250
    assert shown[0] | shown[1] == set(range(400))
    assert not shown[0] & shown[1]


def test_an_item_keeps_its_caption() -> None:
    rows, captions = np.array([3, 3, 8, 9, 9, 9]), np.array([0, 1, 0, 0, 1, 2])
    order = Order([Pool((64, 64), rows, captions)], 3, 0)
    micros = first(order, order.epoch_start(2))
    pairs = Counter(pair for m in micros for pair in zip(m.rows, m.captions or (), strict=True))
    assert pairs == dict.fromkeys(zip(rows.tolist(), captions.tolist(), strict=True), 2)


def test_nothing_to_train_on_is_said() -> None:
    with pytest.raises(DataError, match="no sample to train on"):
        Order(buckets_of([0]), 4, 0)


def test_a_million_rows_begin_within_two_seconds() -> None:
    rows = np.arange(1_000_000)
    buckets = [Pool((64, 64 * i), rows[i::20]) for i in range(20)]
    began_s = time.perf_counter()
    order = Order(buckets, 4, 0)
    order[0]
    assert time.perf_counter() - began_s < 2
    order[order.epoch_start(1) - 1]
    began_s = time.perf_counter()
    for index in range(2000):
        order[index]
    assert time.perf_counter() - began_s < 1


def test_a_million_weighted_rows_begin_within_three_seconds() -> None:
    rows = np.arange(1_000_000)
    pools = [Pool((64, 64 * i), rows[i::20], None, np.where(rows[i::20] % 7, 1.0, 1.5)) for i in range(20)]
    began_s = time.perf_counter()
    order = Order(pools, 4, 0)
    order[order.epoch_start(3)]
    assert time.perf_counter() - began_s < 3
