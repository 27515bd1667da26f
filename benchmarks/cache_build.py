"""How fast a build sees what is there: a first scan and a rebuild of unchanged captioned files, and what they hold.

`python -m benchmarks.cache_build [--count N] [--json FILE]` draws N small, distinct, captioned pictures into a
temporary folder, builds them once with an encoder that costs nothing in place of the models, and then measures, each in
a process of its own and the files in the page cache:

    read + hash   the bytes of every picture and caption, and blake2b of the pictures: what a first scan must do
    first scan    the same files as samples with their keys, against an empty store
    rehash        cache-build --rehash with every record stored: all files are read again
    rebuild       cache-build with every record stored and no file changed

Pictures of some 3 KB are the hard case: what is done for each file outweighs its bytes. So reading and the first scan
are also compared over pictures of some 200 KB. A tenth of the small files says how everything grows. Memory is private
and anonymous: pages of the store that are mapped belong to the kernel, which takes them back at need.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np

from benchmarks.own_memory import Watch
from cache_builder.build import BuildOptions, build
from cache_builder.config import BuildConfig
from cache_builder.encode import Captions, Crop, Framed, Job
from cache_builder.report import BuildReport
from cache_builder.scan import Scanner
from cache_builder.sources.folder import FolderSource
from demo.tiny_model import write_tiny_model
from shared.config import load_config
from shared.record import encode_record
from shared.store import StoreWriter

SETTINGS = (
    "images.resolution=64",
    "images.step=16",
    "images.max_aspect=1",
)
FOLDER_FILES = 1000
EDGE_PX = 96
LARGE_PX = 400
SETTLE_S = 3.0
WAYS = ("read + hash", "first scan", "rehash", "rebuild")


class FreeEncoder:
    """Stands in for the models: the same records for every picture and caption, made at once."""

    device = "cpu"

    def __init__(self, *_: object) -> None:
        pass

    def encode(self, job: Job) -> list[Framed]:
        """Whatever is asked for."""
        return self.encode_captions(job.texts, job.keys) if isinstance(job, Captions) else self.encode_crops(job)

    def encode_captions(self, captions: Sequence[str], keys: Sequence[bytes]) -> list[Framed]:
        """Two records for each caption, without the embeds."""
        from cache_builder.keys import text_facts_key

        facts = {"tokens": 8, "truncated": False}
        return [
            (each, encode_record(each, kind, {}, facts))
            for key in keys
            for each, kind in ((key, "text"), (text_facts_key(key), "text facts"))
        ]

    def encode_crops(self, crops: Sequence[Crop]) -> list[Framed]:
        """Latents of zeros."""
        zeros = np.zeros((4, 8, 8), np.float16)
        return [(crop.key, encode_record(crop.key, "latents", {"mean": zeros, "logvar": zeros}, {})) for crop in crops]


def write_pictures(folder: Path, count: int, edge_px: int = EDGE_PX, grain_px: int = EDGE_PX // 6) -> int:
    """`count` JPEG pictures, no two alike, each with a caption of its own; returns their bytes."""
    from io import BytesIO

    from PIL import Image

    total = 0
    for index in range(count):
        place = folder / f"{index // FOLDER_FILES:05d}"
        if index % FOLDER_FILES == 0:
            place.mkdir(parents=True)
        coarse = np.random.default_rng(index).integers(0, 256, (edge_px // grain_px, edge_px // grain_px, 3), np.uint8)
        file = BytesIO()
        Image.fromarray(coarse).resize((edge_px, edge_px), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        caption = f"picture number {index}, blocks of colour in rows and columns, seed {index * 7919 % 100003}".encode()
        (place / f"{index:07d}.jpg").write_bytes(file.getvalue())
        (place / f"{index:07d}.txt").write_bytes(caption)
        total += len(file.getvalue()) + len(caption)
    return total


def read_and_hash(folder: Path) -> float:
    """Seconds to read every file under `folder` in a walk, whole, and to hash the pictures."""
    started_s = time.perf_counter()
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            descriptor = os.open(f"{place}/{name}", os.O_RDONLY)
            data = os.read(descriptor, os.fstat(descriptor).st_size + 1)
            os.close(descriptor)
            if name.endswith(".jpg"):
                hashlib.blake2b(data, digest_size=32).digest()
    return time.perf_counter() - started_s


def first_scan(folder: Path) -> float:
    """Seconds until every file is a sample, with nothing known of any."""
    config = load_config(BuildConfig, sets=list(SETTINGS))
    with tempfile.TemporaryDirectory() as empty, StoreWriter(Path(empty) / "store") as store:
        started_s = time.perf_counter()
        Scanner(config, "ab" * 32, "float32", {}, BuildReport()).scan([_source(folder, config)], store)
        return time.perf_counter() - started_s


def whole_build(folder: Path, rehash: bool) -> float:
    """Seconds of a build into the store beside `folder`, encoders for nothing."""
    config = load_config(BuildConfig, sets=list(SETTINGS))
    options = BuildOptions(folder.parent / "store", "main", "cpu", rehash=rehash)
    started_s = time.perf_counter()
    with patch("cache_builder.build.SampleEncoder", FreeEncoder):
        build([_source(folder, config)], folder.parent / "model", config, options)
    return time.perf_counter() - started_s


def _source(folder: Path, config: BuildConfig) -> FolderSource:
    return FolderSource(folder, "pictures", config.captions, config.images.max_bytes)


RUNS: dict[str, Callable[[Path], float]] = {
    "read + hash": read_and_hash,
    "first scan": first_scan,
    "rehash": lambda folder: whole_build(folder, rehash=True),
    "rebuild": lambda folder: whole_build(folder, rehash=False),
}


def run_alone(way: str, folder: Path) -> dict[str, float]:
    """What `way` took, in a process of its own: seconds, and the most private memory in bytes."""
    command = [sys.executable, "-m", "benchmarks.cache_build", "--alone", way, str(folder)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(finished.stdout.splitlines()[-1]))


def alone(way: str, folder: Path) -> None:
    """The process of its own: one way, measured, as a line of JSON."""
    watch = Watch()
    seconds = RUNS[way](folder)
    print(json.dumps({"seconds": seconds, "private_bytes": watch.stop()}))


def measure(place: Path, count: int, rounds: int) -> dict[str, dict[str, float]]:
    """The best of `rounds` of every way over `count` pictures, in turns; memory is the most of all rounds."""
    folder = place / str(count) / "pictures"
    size = write_pictures(folder, count)
    write_tiny_model(folder.parent / "model")
    filled = run_alone("rehash", folder)
    time.sleep(SETTLE_S)  # what was written a moment ago is read again by the first rebuild, whatever is remembered
    run_alone("rebuild", folder)
    runs = [{way: run_alone(way, folder) for way in WAYS} for _ in range(rounds)]
    best = {
        way: {
            "seconds": min(run[way]["seconds"] for run in runs),
            "private_bytes": max(run[way]["private_bytes"] for run in runs),
        }
        for way in WAYS
    }
    return best | {"first build": filled, "files": {"pictures": count, "bytes": size}}


def measure_large(place: Path, count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Reading and a first scan of pictures of usual size."""
    folder = place / "large" / "pictures"
    size = write_pictures(folder, count, LARGE_PX, 1)
    runs = [{way: run_alone(way, folder) for way in WAYS[:2]} for _ in range(rounds)]
    best = {way: {"seconds": min(run[way]["seconds"] for run in runs)} for way in WAYS[:2]}
    return best | {"files": {"pictures": count, "bytes": size}}


def show(results: dict[str, dict[str, dict[str, float]]]) -> None:
    """Each way at both sizes, per picture and together, and how it grows."""
    small, large, usual = results.values()
    few, many = (found["files"]["pictures"] for found in (small, large))
    print(f"\n  {'':12} {few:>9.0f} {many:>9.0f} pictures, s   growth   MB at {few:.0f}   at {many:.0f}")
    for way in (*WAYS, "first build"):
        one, other = small[way], large[way]
        grown = other["seconds"] / one["seconds"]
        low, high = (found["private_bytes"] / 1e6 for found in (one, other))
        print(f"  {way:12} {one['seconds']:9.2f} {other['seconds']:9.2f} {grown:20.1f} {low:10.0f} {high:10.0f}")
    print()
    for found in (large, usual):
        reach = found["read + hash"]["seconds"] / found["first scan"]["seconds"]
        kb = found["files"]["bytes"] / found["files"]["pictures"] / 1e3
        print(f"  first scan: {reach:.2f} of the rate of reading and hashing alone, pictures of {kb:.0f} KB")
    print(
        f"  rebuild: {large['rebuild']['seconds']:.2f} s, {1e6 * large['rebuild']['seconds'] / many:.0f} us a picture"
    )


def main() -> int:
    """Measure, print, and keep the numbers where --json says."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.cache_build", description="Time and memory of scans and rebuilds."
    )
    parser.add_argument("--count", type=int, default=100_000, help="captioned pictures (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the numbers")
    parser.add_argument("--alone", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        alone(options.alone[0], Path(options.alone[1]))
        return 0
    with tempfile.TemporaryDirectory() as name:
        counts = (options.count // 10, options.count)
        results = {str(count): measure(Path(name), count, options.rounds) for count in counts}
        results["large"] = measure_large(Path(name), max(1, options.count // 100), options.rounds)
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
