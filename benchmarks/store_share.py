"""A store read by two processes at once, and from a cold disk.

`python -m benchmarks.store_share [--json FILE]`. Two readers on two cores should each be as fast as one alone, and the
second should cost no memory for the store: both map the same pages. Cold: pages are dropped before each round, which no
reader holds then, and the store is read in random order beside plain reads of as many bytes at random places of a file.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.store_read import BATCH, MOMENTS, Batches, from_store, sample_bytes, write_layouts
from shared.store import StoreReader

CONSUMED_PER_S = 20  # samples that a fast trainer takes


def measure_two(count: int, seconds: float) -> dict[str, float]:
    """Two reader processes at once against one: samples per second, and memory of the second one's own."""
    with tempfile.TemporaryDirectory() as name:
        write_layouts(Path(name), MOMENTS, count, ())
        one = _readers(Path(name), count, 1, seconds)
        two = _readers(Path(name), count, 2, seconds)
    return {
        "one_per_s": one[0][0],
        "two_per_s": sum(rate for rate, _, _ in two),
        "ratio": sum(rate for rate, _, _ in two) / one[0][0],
        "pss_one_mib": one[0][1],
        "pss_two_mib": sum(pss for _, pss, _ in two),
        "private_each_mib": max(private for _, _, private in two),
    }


def _readers(folder: Path, count: int, processes: int, seconds: float) -> list[tuple[float, float, float]]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes) as pool:
        barrier = context.Manager().Barrier(processes)
        return pool.starmap(_read_for, [(folder, count, seconds, barrier)] * processes, chunksize=1)


def _read_for(folder: Path, count: int, seconds: float, barrier: Any) -> tuple[float, float, float]:
    import time

    batches = Batches(MOMENTS, count)
    with StoreReader(folder / "store") as store:
        read = from_store(store, MOMENTS, batches)
        for _ in range(count // BATCH):
            read()
        barrier.wait()
        done, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            done += read()
        rate = done / (time.perf_counter() - began)
        barrier.wait()
        pss, private = _store_mib(folder / "store" / "data.mdb")
        barrier.wait()
    return rate, pss, private


def _store_mib(data: Path) -> tuple[float, float]:
    """Memory that this process is charged for the mapped store, and how much of it is its alone; MiB."""
    found, pss, private = False, 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            found = line.endswith(str(data))
        elif found and line.startswith("Pss:"):
            pss += int(line.split()[1])
        elif found and line.startswith("Private_Dirty:"):
            private += int(line.split()[1])
    return pss / 1024, private / 1024


def measure_cold(folder: Path, count: int, rounds: int) -> dict[str, float]:
    """Samples per second of plain reads and of the store, medians, and the longest wait for a batch of the store."""
    write_layouts(folder, MOMENTS, count, ())
    plain, store, waits = [], [], []
    for number in range(rounds):
        order = random.Random(number).sample(range(count), count)
        plain.append(_cold_file(folder / "plain", order))
        rate, longest_s = _cold_store(folder / "store", order)
        store.append(rate)
        waits.append(longest_s)
    rates = {"plain_per_s": median(plain), "store_per_s": median(store)}
    return rates | {"ratio": median(s / p for s, p in zip(store, plain, strict=True)), "longest_s": max(waits)}


def _cold_file(path: Path, order: list[int]) -> float:
    _drop(path)
    size = sample_bytes(MOMENTS)
    buffer, file = bytearray(size), os.open(path, os.O_RDONLY)
    began = time.perf_counter()
    for index in order:
        os.preadv(file, [buffer], index * size)
    rate = len(order) / (time.perf_counter() - began)
    os.close(file)
    return rate


def _cold_store(path: Path, order: list[int]) -> tuple[float, float]:
    _drop(path / "data.mdb")
    batches, longest_s = Batches(MOMENTS, len(order)), 0.0
    with StoreReader(path) as store:
        began = time.perf_counter()
        for first in range(0, len(order), BATCH):
            at = time.perf_counter()
            from_store(store, MOMENTS, batches, order[first : first + BATCH])()
            longest_s = max(longest_s, time.perf_counter() - at)
        return len(order) / (time.perf_counter() - began), longest_s


def _drop(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def main() -> int:
    """Measure, print, and keep the numbers where --json says."""
    parser = argparse.ArgumentParser(prog="benchmarks.store_share", description="A store shared, and a store cold.")
    parser.add_argument("--count", type=int, default=1000, help="samples (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the numbers")
    options = parser.parse_args()
    count = options.count // BATCH * BATCH
    two = measure_two(count, 4.0)
    print(f"two reader processes at once: {two['ratio']:.2f} times one ({two['one_per_s']:.0f} samples/s)")
    print(f"  the store's memory: {two['pss_one_mib']:.0f} MiB with one reader, {two['pss_two_mib']:.0f} with two")
    with tempfile.TemporaryDirectory(dir=".") as name:  # not /tmp, which may be memory
        cold = measure_cold(Path(name), count, options.rounds)
    wait = cold["longest_s"] * CONSUMED_PER_S / BATCH
    print(
        f"cold: store {cold['store_per_s']:.0f} samples/s, plain reads {cold['plain_per_s']:.0f}: {cold['ratio']:.2f}"
    )
    print(f"  the longest wait for a batch is {wait:.2f} of the time in which {CONSUMED_PER_S} samples/s consume one")
    if options.json:
        options.json.write_text(json.dumps({"two readers": two, "cold": cold}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
