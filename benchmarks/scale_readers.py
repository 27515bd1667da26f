"""Trainers' side of a large manifest: how soon it is open, how soon there is a batch, what memory it takes.

Two processes of their own at once, as two experts train; each opens store and manifest as `train-expert` does, reads
batches, and goes from one epoch into the next. Memory is what the process has of its own beyond its imports: anonymous
pages, now and at the most, and its share (PSS) of all that it has mapped, files too.
"""

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.own_memory import Watch
from shared.manifest import open_manifest
from shared.record import encode_record
from shared.store import StoreReader, StoreWriter
from trainer.data import BatchReader
from trainer.data_config import DataConfig
from trainer.partitions import PartitionedOrder
from trainer.sampler import MicroBatch
from trainer.view import view_of

BATCH, BATCHES, SEED = 8, 8, 0
DRAWN = 2000  # micro-batches of which the rows alone are looked up


def write_first_batches(store: Path) -> None:
    """The records that the first micro-batches ask for, at their full size: the rest of the store is not there."""
    manifest = open_manifest(store, "main")
    order = PartitionedOrder(view_of(manifest, DataConfig()), BATCH, SEED)
    with StoreWriter(store) as writer:
        for index in range(BATCHES):
            micro = order[index]
            shape = (4, micro.bucket_hw[0] // 8, micro.bucket_hw[1] // 8)
            latents = {name: np.zeros(shape, np.float16) for name in ("mean", "logvar")}
            text = {
                "prompt_embeds": np.zeros((77, 2048), np.float16),
                "pooled_prompt_embeds": np.zeros(1280, np.float16),
            }
            for row in manifest.rows(micro.rows):
                keys = {row.variants[0].latent_key: ("latents", latents), row.text_keys[0]: ("text", text)}
                writer.put_many([(key, encode_record(key, *of, {})) for key, of in sorted(keys.items())])


def measure_readers(store: Path, *, cold: bool, count: int = 2) -> list[dict[str, float]]:
    """What each of `count` processes at once found; `cold`: with nothing of the manifest in memory before."""
    if cold:
        for path in (store / "manifests" / "main").glob("*.arrow"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    context = multiprocessing.get_context("spawn")
    with context.Pool(count) as pool:
        barrier = context.Manager().Barrier(count)
        return pool.starmap(_read, [(store, barrier)] * count, chunksize=1)


def _read(store: Path, barrier: Any) -> dict[str, float]:
    before = memory_mb()
    barrier.wait()
    watch = Watch()
    with StoreReader(store) as reader:
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        manifest = open_manifest(store, "main", check_beside=True)
        open_s = time.perf_counter() - began_s
        pools = view_of(manifest, DataConfig())
        order = PartitionedOrder(pools, BATCH, SEED)
        batches = BatchReader(
            reader, manifest, pools, captions="random", seed=SEED, pin_memory=False, on_corrupt=_damaged
        )
        batches.read(order[0])
        first_batch_s, first_batch_cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        for index in range(1, BATCHES):
            batches.read(order[index])
        per_epoch, at_s = round(order.per_epoch(1)), time.perf_counter()
        for index in range(DRAWN):
            _look_up(manifest, order[index * (per_epoch // DRAWN or 1)])
        drawn_s = (time.perf_counter() - at_s) / DRAWN
        after = memory_mb()
        at_s = time.perf_counter()
        _look_up(manifest, order[per_epoch + 1])
        next_epoch_s = time.perf_counter() - at_s
        barrier.wait()
    return {
        "rows": len(manifest),
        "open_s": open_s,
        "first_batch_s": first_batch_s,
        "first_batch_cpu_s": first_batch_cpu_s,
        "drawn_s": drawn_s,
        "next_epoch_s": next_epoch_s,
        "anonymous_mb": after["Anonymous"] - before["Anonymous"],
        "most_anonymous_mb": watch.stop() / 1e6 - before["Anonymous"],
        "pss_mb": after["Pss"] - before["Pss"],
    }


def _look_up(manifest: Any, micro: MicroBatch) -> None:
    assert len(manifest.rows(micro.rows)) == BATCH


def _damaged(path: str, why: str) -> None:
    raise RuntimeError(f"{path}: {why}")


def memory_mb() -> dict[str, float]:
    """Memory of this process: fields of smaps_rollup, MB."""
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]]
    return {name.rstrip(":"): int(value) * 1024 / 1e6 for name, value, _ in lines}
