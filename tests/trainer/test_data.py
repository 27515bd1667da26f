"""Store to batch: what a sample is told, what dropout leaves, and what stands in for a record that is damaged."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import lmdb
import numpy as np
import pytest
import torch

from shared.errors import DataError
from shared.manifest import Manifest, open_manifest
from shared.manifest_rows import ManifestRow
from shared.record import encode_record
from shared.store import StoreReader, StoreWriter
from trainer.batch import Batch
from trainer.data import BatchReader, prefetch
from trainer.data_config import DataConfig
from trainer.loop import train_expert
from trainer.sampler import MicroBatch, Order
from trainer.view import view_of

Corrupt = list[tuple[str, str]]


def reader_of(
    store: StoreReader,
    manifest: Manifest,
    corrupt: Corrupt | None = None,
    seed: int = 0,
) -> BatchReader:
    heard = [] if corrupt is None else corrupt
    return BatchReader(
        store,
        manifest,
        view_of(manifest, DataConfig()),
        captions="random",
        seed=seed,
        pin_memory=False,
        on_corrupt=lambda path, why: heard.append((path, why)),
    )


def damage(store: Path, keys: Sequence[bytes]) -> None:
    """Flip a bit of each record, as a failing disk does."""
    with lmdb.open(str(store), map_size=1 << 30) as env, env.begin(write=True) as transaction:
        for key in keys:
            value = bytearray(transaction.get(key) or b"")
            value[-1] ^= 1
            transaction.put(key, bytes(value))


def rows_of(manifest: Manifest) -> dict[int, ManifestRow]:
    indices = [int(row) for bucket in manifest.buckets("train") for row in bucket.rows]
    return dict(zip(indices, manifest.rows(indices), strict=True))


def test_a_sample_is_its_record_and_its_sizes(world: Any) -> None:
    manifest = open_manifest(world.store, "main")
    bucket = manifest.buckets("train")[0]
    chosen = tuple(int(row) for row in bucket.rows[:3])
    with StoreReader(world.store) as store, store.snapshot() as snapshot:
        batch = reader_of(store, manifest).read(MicroBatch(bucket.hw, chosen, 2, 6))
        for i, row in enumerate(manifest.rows(chosen)):
            latents = snapshot.read(row.variants[0].latent_key).tensors
            assert np.array_equal(batch.moments.mean[i].numpy(), latents["mean"])
            assert batch.moments.logvar is not None
            assert np.array_equal(batch.moments.logvar[i].numpy(), latents["logvar"])
            texts = [snapshot.read(key).tensors for key in row.text_keys]
            said = batch.text.prompt_embeds[i].numpy()
            index = [np.array_equal(said, text["prompt_embeds"]) for text in texts].index(True)
            assert np.array_equal(batch.text.pooled_prompt_embeds[i].numpy(), texts[index]["pooled_prompt_embeds"])
            variant = row.variants[0]
            assert batch.time_ids[i].tolist() == [*row.original_hw, *variant.crop_top_left, *variant.target_hw]
    assert batch.time_ids.dtype == torch.float32
    assert batch.places == [(2, 6), (2, 7), (2, 8)]


def test_tensors_that_the_trainer_does_not_know_are_passed_over(world: Any, tmp_path: Path) -> None:
    """A record may carry a `mask`, which is reserved, or what later versions add."""
    other = world.copy(tmp_path / "store")
    manifest = open_manifest(other.store, "main")
    bucket = manifest.buckets("train")[0]
    micro = MicroBatch(bucket.hw, tuple(int(row) for row in bucket.rows[:2]), 0, 0)
    with StoreReader(other.store) as store:
        plain = reader_of(store, manifest).read(micro)
    with StoreWriter(other.store) as writer:
        for row in manifest.rows(micro.rows):
            key = row.variants[0].latent_key
            with writer.snapshot() as snapshot:
                tensors = dict(snapshot.read(key).tensors)
            mask = np.ones(tensors["mean"].shape[1:], np.uint8)
            writer.delete_many([key])
            writer.put_many([(key, encode_record(key, "latents", {"mask": mask, **tensors, "later": mask}, {}))])
    with StoreReader(other.store) as store:
        masked = reader_of(store, manifest).read(micro)
    assert masked.moments.logvar is not None
    assert plain.moments.logvar is not None
    assert torch.equal(masked.moments.mean, plain.moments.mean)
    assert torch.equal(masked.moments.logvar, plain.moments.logvar)


def test_each_caption_is_shown_equally_often(world: Any) -> None:
    manifest = open_manifest(world.store, "main")
    index, row = next((i, row) for i, row in rows_of(manifest).items() if len(row.text_keys) == 2)
    counts: Counter[int] = Counter()
    with StoreReader(world.store) as store:
        with store.snapshot() as snapshot:
            texts = [snapshot.read(key).tensors["pooled_prompt_embeds"].copy() for key in row.text_keys]
        reader = reader_of(store, manifest)
        for epoch in range(400):
            batch = reader.read(MicroBatch(row.bucket_hw, (index,), epoch, 0))
            shown = batch.text.pooled_prompt_embeds[0].numpy()
            counts[[np.array_equal(shown, text) for text in texts].index(True)] += 1
    assert 160 < counts[0] < 240  # 4 deviations are 40


def test_each_crop_is_shown_equally_often_and_told_truly(world: Any, tmp_path: Path) -> None:
    own = world.copy(tmp_path / "store")
    sets = ("images.crop=random", "images.variants=2", "images.max_aspect=1", "images.downsample_to=80")
    own.build(*sets, "images.flip=force", manifest="varied")
    manifest = open_manifest(own.store, "varied")
    index, row = next((i, row) for i, row in rows_of(manifest).items() if len(row.variants) == 4)
    counts: Counter[int] = Counter()
    with StoreReader(own.store) as store:
        with store.snapshot() as snapshot:
            means = [snapshot.read(variant.latent_key).tensors["mean"].copy() for variant in row.variants]
        reader, again = reader_of(store, manifest), reader_of(store, manifest)
        for epoch in range(400):
            micro = MicroBatch(row.bucket_hw, (index,), epoch, 0)
            batch = reader.read(micro)
            which = [np.array_equal(batch.moments.mean[0].numpy(), mean) for mean in means].index(True)
            variant = row.variants[which]
            assert batch.time_ids[0].tolist() == [*row.original_hw, *variant.crop_top_left, *variant.target_hw]
            assert epoch > 20 or torch.equal(batch.moments.mean, again.read(micro).moments.mean)
            counts[which] += 1
    assert all(65 < counts[which] < 135 for which in range(4))  # 4 deviations are 35


def test_a_damaged_record_is_replaced_by_the_next_of_its_bucket_and_told_once(world: Any, tmp_path: Path) -> None:
    own = world.copy(tmp_path / "store")
    manifest = open_manifest(own.store, "main")
    bucket = manifest.buckets("train")[0]
    index = int(bucket.rows[-1])  # the next one is the first
    row = manifest.rows([index])[0]
    damage(own.store, [row.variants[0].latent_key])
    heard: Corrupt = []
    with StoreReader(own.store) as store:
        reader = reader_of(store, manifest, corrupt=heard)
        for epoch in (0, 1):
            batch = reader.read(MicroBatch(bucket.hw, (int(bucket.rows[1]), index), epoch, 0))
            instead = reader.read(MicroBatch(bucket.hw, (int(bucket.rows[1]), int(bucket.rows[0])), epoch, 0))
            assert torch.equal(batch.moments.mean, instead.moments.mean)
            assert torch.equal(batch.text.prompt_embeds, instead.text.prompt_embeds)
            assert batch.places == [(epoch, 0), (epoch, 1)]
    assert [path for path, _ in heard] == [row.path]
    assert "damaged (checksum)" in heard[0][1]


def test_what_replaces_a_sample_does_not_depend_on_what_was_read_before(world: Any, tmp_path: Path) -> None:
    """One of two captions is damaged: the sample is replaced where that one is chosen, and only there."""
    own = world.copy(tmp_path / "store")
    manifest = open_manifest(own.store, "main")
    index, row = next((i, row) for i, row in rows_of(manifest).items() if len(row.text_keys) == 2)
    damage(own.store, row.text_keys[1:])
    micros = [MicroBatch(row.bucket_hw, (index,), epoch, 0) for epoch in range(12)]

    def means(batches: list[Batch]) -> list[list[float]]:
        return [batch.moments.mean.flatten().tolist() for batch in batches]

    with StoreReader(own.store) as store:
        reader = reader_of(store, manifest)
        unbroken = means([reader.read(micro) for micro in micros])
        afresh = means([reader_of(store, manifest).read(micro) for micro in micros])
    assert unbroken == afresh
    assert len({tuple(mean) for mean in unbroken}) == 2


def test_a_bucket_without_a_sound_sample_is_said(world: Any, tmp_path: Path) -> None:
    own = world.copy(tmp_path / "store")
    manifest = open_manifest(own.store, "main")
    bucket = manifest.buckets("train")[0]
    rows = manifest.rows(bucket.rows)
    damage(own.store, [row.variants[0].latent_key for row in rows])
    with StoreReader(own.store) as store, pytest.raises(DataError, match="2 samples of manifest 'main' are corrupt"):
        reader_of(store, manifest).read(MicroBatch(bucket.hw, (int(bucket.rows[0]),), 0, 0))


def test_a_run_logs_one_damaged_record_and_stops_at_two(
    world: Any, events: Callable[..., list[dict[str, Any]]], start: Callable[..., Any], tmp_path: Path
) -> None:
    own = world.copy(tmp_path / "store")
    manifest = open_manifest(own.store, "main")
    order = Order(view_of(manifest, DataConfig()), 2, 0)
    drawn = [row for i in range(4) for row in order[i].rows]
    keys = [row.variants[0].latent_key for row in manifest.rows(drawn)]
    damage(own.store, [keys[2]])
    train_expert(own.request(tmp_path / "one"))
    assert [event["path"] for event in events(tmp_path / "one", "corrupt")] == [manifest.rows(drawn)[2].path]
    assert events(tmp_path / "one", "complete")
    damage(own.store, [keys[5]])
    command = start("train-expert", own.arguments(tmp_path / "two"))
    assert command.wait() == 65
    lines = [line for line in command.errors() if line.startswith("error:")]
    assert len(lines) == 1
    assert "2 samples of manifest 'main' are corrupt" in lines[0]
    assert len(events(tmp_path / "two", "corrupt")) == 2


def test_a_store_of_means_trains(world: Any, tmp_path: Path) -> None:
    own = world.copy(tmp_path / "store")
    own.build("encode.latents=mean", manifest="means")
    manifest = open_manifest(own.store, "means")
    bucket = manifest.buckets("train")[0]
    with StoreReader(own.store) as store:
        batch = reader_of(store, manifest).read(MicroBatch(bucket.hw, (int(bucket.rows[0]),), 0, 0))
    assert batch.moments.logvar is None
    request = own.request(tmp_path / "run", "steps=2")
    assert train_expert(dataclasses.replace(request, manifest="means")) == 2


def test_a_batch_of_unequal_parts_is_refused(world: Any) -> None:
    manifest = open_manifest(world.store, "main")
    bucket = manifest.buckets("train")[0]
    with StoreReader(world.store) as store:
        batch = reader_of(store, manifest).read(MicroBatch(bucket.hw, tuple(bucket.rows[:2].tolist()), 0, 0))
    with pytest.raises(DataError, match="a batch of 2 samples"):
        Batch(batch.moments, batch.text, batch.time_ids[:1], batch.places)


def test_prefetching_keeps_the_order_and_hands_errors_on() -> None:
    def read(index: int) -> Any:
        if index == 7:
            raise DataError("no more")
        return index

    numbers: Iterator[Any] = prefetch(read, 3)
    assert [next(numbers) for _ in range(4)] == [3, 4, 5, 6]
    with pytest.raises(DataError, match="no more"):
        next(numbers)
    endless = prefetch(cast(Any, int), 0)
    next(endless)
    endless.close()  # its thread ends with it
