"""What a second machine brings a build: two workers of a Ray cluster against one encoder here, and the one who writes.

`python -m benchmarks.ray_build [--pictures N] [--holds core|device] [--json FILE]` builds N small pictures into a
temporary folder twice, by the local runner and by two Ray workers, with an encoder in place of the models that holds
its core, or as a GPU does only time, for HOLD_S for each picture. Counted is from the second chunk's commit to the
last, so that the start of Ray, which is told beside it, does not weigh on few pictures. Both must seal one digest.

Two workers that hold cores need two free ones: beside other work compare the processor time of the command itself for
each picture, which bounds how many workers it can serve, or `--holds device`, which asks for no core.

Then what the command does with answers: unpack, verify, commit records of 438 KiB in chunks, sync on.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.cache_build import SETTINGS, FreeEncoder, write_pictures
from cache_builder.build import BuildOptions, build
from cache_builder.chunks import pack, unpack
from cache_builder.config import BuildConfig
from cache_builder.encode import Captions, Crop, Framed, Job
from cache_builder.fill import Filler
from cache_builder.ray_worker import Worker
from cache_builder.sources.folder import FolderSource
from demo.tiny_model import write_tiny_model
from shared.config import load_config
from shared.record import encode_record, verify_frame
from shared.store import StoreWriter

HOLD_S = 0.15
WORKERS = 2
CHUNK = 2
RECORD_BYTES = 438 << 10
RECORDS = 600
RECORDS_AT_ONCE = 32
HOLDS = "SDXL_EXPERTS_BENCHMARK_HOLDS"


class HoldingEncoder:
    """Records of zeros, each made for HOLD_S seconds: of a core, or of a device that leaves the cores alone."""

    def __init__(self, model: Path, device: str, dtype: str, latents: str, chunks: int) -> None:
        self.model, self.device, self.dtype, self.latents, self.chunks = model, device, dtype, latents, chunks
        self._free, self._holds = FreeEncoder(), os.environ[HOLDS]

    def encode(self, job: Job) -> list[Framed]:
        """Whatever is asked for."""
        return self.encode_captions(job.texts, job.keys) if isinstance(job, Captions) else self.encode_crops(job)

    def encode_captions(self, captions: Sequence[str], keys: Sequence[bytes]) -> list[Framed]:
        """At once."""
        return self._free.encode_captions(captions, keys)

    def encode_crops(self, crops: Sequence[Crop]) -> list[Framed]:
        """One after the other."""
        for _ in crops:
            hold(self._holds)
        return self._free.encode_crops(crops)


def hold(what: str) -> None:
    """Take HOLD_S of a core's time, or of time."""
    if what == "device":
        time.sleep(HOLD_S)
        return
    began_s, block = time.thread_time(), bytes(1 << 20)
    while time.thread_time() - began_s < HOLD_S:
        hashlib.blake2b(block)  # gives up the interpreter's lock, as an encoder does


class HoldingWorker:
    """A worker with such an encoder; it runs in Ray's process."""

    def __init__(self, told: bytes) -> None:
        with patch("cache_builder.ray_worker.SampleEncoder", HoldingEncoder):
            self._worker = Worker(told)

    def check(self) -> bytes:
        """As Worker says."""
        return self._worker.check()

    def work(self, message: bytes) -> bytes:
        """As Worker says."""
        return self._worker.work(message)


@contextmanager
def watched() -> Iterator[list[tuple[float, float, int]]]:
    """(time, processor time of this process, crops) of each commit of pictures inside the block."""
    commits: list[tuple[float, float, int]] = []
    commit: Any = Filler._commit

    def watching(filler: Filler, samples: Any, batch: Any) -> Any:
        lost = commit(filler, samples, batch)
        commits.append((time.perf_counter(), time.process_time(), len(batch)))
        return lost

    with patch.object(Filler, "_commit", watching):
        yield commits


def one_build(place: Path, runner: Any) -> dict[str, Any]:
    """A whole build by `runner`; crops per second and the command's processor time for a crop, in its steady part."""
    sets = [*SETTINGS, f"encode.batch={CHUNK}", f"ray.chunk={CHUNK}", f"ray.workers={WORKERS}"]
    config = load_config(BuildConfig, sets=sets)
    source = FolderSource(place / "pictures", "pictures", config.captions, config.images.max_bytes)
    options = BuildOptions(place / f"store-{runner}", "main", "cpu", runner=runner)
    began_s = time.perf_counter()
    with (
        patch("cache_builder.build.SampleEncoder", HoldingEncoder),
        patch("cache_builder.ray_runner.Worker", HoldingWorker),
        watched() as commits,
    ):
        report = build([source], place / "model", config, options)
    (first_s, first_cpu_s, _), (last_s, last_cpu_s, _) = commits[WORKERS - 1], commits[-1]
    crops = sum(count for *_, count in commits[WORKERS:])
    return {
        "digest": report.digest,
        "crops_per_s": crops / (last_s - first_s),
        "own_cpu_s_per_crop": (last_cpu_s - first_cpu_s) / crops,
        "until_first_commit_s": commits[0][0] - began_s,
        "whole_s": time.perf_counter() - began_s,
    }


def writing(place: Path) -> dict[str, float]:
    """Records per second, and per second of processor time, from answers of workers to committed."""
    answers = [*_answers()]
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    with StoreWriter(place / "written") as store:
        for answer in answers:
            header, frames = unpack(answer)
            framed = [(key, bytes(frame)) for key, frame in zip(header["keys"], frames, strict=True)]
            for key, frame in framed:
                verify_frame(key, frame)
            store.put_many(framed)
    seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    return {"records_per_s": RECORDS / seconds, "records_per_cpu_s": RECORDS / cpu_s}


def _answers() -> Iterator[bytes]:
    noise = np.random.default_rng(0)
    for start in range(0, RECORDS, RECORDS_AT_ONCE):
        keys = [hashlib.blake2b(b"%d" % n, digest_size=16).digest() for n in range(start, start + RECORDS_AT_ONCE)]
        keys = keys[: RECORDS - start]
        latents = [noise.integers(0, 1 << 16, RECORD_BYTES // 2, np.uint16).view(np.uint8) for _ in keys]
        yield pack(
            {"keys": keys},
            [encode_record(key, "latents", {"mean": one}, {}) for key, one in zip(keys, latents, strict=True)],
        )


def measure(place: Path, pictures: int, holds: str) -> dict[str, Any]:
    """Everything, once."""
    os.environ[HOLDS] = holds
    write_pictures(place / "pictures", pictures)
    write_tiny_model(place / "model")
    builds = {runner: one_build(place, runner) for runner in ("local", "ray")}
    if builds["local"]["digest"] != builds["ray"]["digest"]:
        raise SystemExit("the two builds have sealed different manifests")
    gain = builds["ray"]["crops_per_s"] / builds["local"]["crops_per_s"]
    return {"holds": holds, "pictures": pictures, **builds, "gain": gain, "writing": writing(place)}


def show(found: dict[str, Any]) -> None:
    """As a table."""
    print(f"\n  {found['pictures']} pictures, an encoder that holds its {found['holds']} for {HOLD_S} s a picture")
    for runner in ("local", "ray"):
        one = found[runner]
        own_ms = 1e3 * one["own_cpu_s_per_crop"]
        print(
            f"  {runner:6} {one['crops_per_s']:6.2f} pictures/s, own processor time {own_ms:6.1f} ms a picture, "
            f"{one['until_first_commit_s']:5.1f} s until the first commit, {one['whole_s']:5.1f} s in all"
        )
    print(f"  {WORKERS} Ray workers are {found['gain']:.2f} times the local runner, the manifest is the same")
    rates = found["writing"]
    print(
        f"  writing: {rates['records_per_s']:.0f} records/s of {RECORD_BYTES >> 10} KiB, sync on "
        f"({rates['records_per_cpu_s']:.0f} for a second of processor time)"
    )


def main() -> int:
    """Measure, print, and keep the numbers where --json says."""
    parser = argparse.ArgumentParser(prog="benchmarks.ray_build", description="A build on two Ray workers.")
    parser.add_argument("--pictures", type=int, default=96, help="default: %(default)s")
    parser.add_argument("--holds", choices=("core", "device"), default="core", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the numbers")
    options = parser.parse_args()
    if options.pictures < 4 * WORKERS * CHUNK:
        parser.error(f"--pictures {options.pictures}: at least {4 * WORKERS * CHUNK}, or there is no steady part")
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), options.pictures, options.holds)
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
