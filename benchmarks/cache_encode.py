"""How much of a build's second pass is not decoding, resizing and encoding: pictures -> crops -> records -> store.

`python -m benchmarks.cache_encode [--json FILE]` draws photograph-like JPEGs, scans them, and fills fresh stores:

    free encoder    one that costs nothing, beside Pillow alone, which reads, decodes and resizes the same files to the
                    same crops on as many threads: what the builder adds to that
    slow encoder    one that sleeps 50 ms for each batch, on pictures that are decoded faster than that: how much of the
                    time it works, from its first batch to its last

Ratios of one run are what can be compared; rates depend on the machine.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.timing import Rate, take_turns
from cache_builder.config import BuildConfig
from cache_builder.encode import Captions, Crop, Job, Records
from cache_builder.fill import Filler
from cache_builder.preview_fit import PreviewKeeper
from cache_builder.report import BuildReport
from cache_builder.runners import LocalRunner
from cache_builder.sample import Sample
from cache_builder.scan import Scanner
from cache_builder.sources.folder import FolderSource
from shared.config import load_config
from shared.preview import PreviewFit, write_preview
from shared.record import encode_record
from shared.store import StoreWriter
from shared.vae import VaeFacts

VAE = VaeFacts("benchmark", 0.13025, 4, 8, True)  # SDXL's shapes
BATCH = 8
BATCH_S = 0.05
SHAPES = ((1152, 1536), (1536, 1152), (1280, 1280))  # 1.6 to 1.8 MP, as (h, w)


def write_photos(folder: Path, count: int, scale: float) -> None:
    """JPEGs with soft areas and grain, of `scale` times SHAPES, each with a caption."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        h, w = (int(edge * scale) for edge in SHAPES[index % len(SHAPES)])
        areas = Image.fromarray(rng.integers(0, 256, (h // 24, w // 24, 3), np.uint8))
        grain = rng.integers(-10, 11, (h, w, 3), np.int16)
        pixels = np.asarray(areas.resize((w, h), Image.Resampling.BICUBIC)) + grain
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:05d}.jpg", quality=90)
        (folder / f"{index:05d}.txt").write_text(f"picture {index}\n")


class Free:
    """Records of zeros, of the size that SDXL's have; sleeps `batch_s` for each batch and notes when."""

    def __init__(self, batch_s: float) -> None:
        self._batch_s = batch_s
        self.busy: list[tuple[float, float]] = []

    def encode(self, job: Job) -> Records:
        """Zeros for every crop."""
        assert not isinstance(job, Captions)
        began = time.perf_counter()
        time.sleep(self._batch_s)
        records = [self._record(crop) for crop in job]
        self.busy.append((began, time.perf_counter()))
        return [*records]

    def busy_share(self) -> float:
        """Of the time from the first batch to the last."""
        return sum(end - began for began, end in self.busy) / (self.busy[-1][1] - self.busy[0][0])

    def _record(self, crop: Crop) -> tuple[bytes, bytes]:
        h, w = crop.size_hw
        zeros = np.zeros((4, h // 8, w // 8), np.float16)
        return crop.key, encode_record(crop.key, "latents", {"mean": zeros, "logvar": zeros}, {})


class World:
    """A scanned folder, and both ways through it."""

    def __init__(self, folder: Path, count: int, scale: float, resolution: int, threads: int) -> None:
        self.folder, self.threads, self._stores = folder, threads, 0
        write_photos(folder / "pictures", count, scale)
        settings = [f"images.resolution={resolution}", f"encode.batch={BATCH}", f"encode.threads={threads}"]
        self.config = load_config(BuildConfig, sets=settings)
        with StoreWriter(folder / "scanned") as store:
            source = FolderSource(folder / "pictures", "set", self.config.captions, self.config.images.max_bytes)
            self.samples = Scanner(self.config, VAE.digest, "float32", {}, BuildReport()).scan([source], store)

    def build(self, encoder: Free) -> int:
        """The second pass into a store of its own; how many pictures were stored."""
        self._stores += 1
        with StoreWriter(self.folder / f"store-{self._stores}") as store:
            write_preview(store.path, VAE.digest, _some_preview())  # fitted once in a store's life: not counted here
            keeper = PreviewKeeper(store.path, VAE.digest)
            report = BuildReport(seen=len(self.samples))
            with LocalRunner(encoder) as runner:
                usable = Filler(store, self.config, report, runner, keeper).encode_pictures(self.samples, VAE)
        assert len(usable) == report.stored == len(self.samples)
        return len(self.samples)

    def pillow(self) -> int:
        """The same files to the same crops, with nothing but Pillow, on as many threads."""
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(self._resized, self.samples))
        return len(self.samples)

    def _resized(self, sample: Sample) -> None:
        plan = sample.crops[0].plan
        (resize_h, resize_w), (h, w) = plan.resize_hw, plan.target_hw
        with Image.open(BytesIO((self.folder / "pictures" / sample.path).read_bytes())) as image:
            x, y = image.width / resize_w, image.height / resize_h
            box = (plan.box_left * x, plan.box_top * y, (plan.box_left + w) * x, (plan.box_top + h) * y)
            box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
            image.resize((w, h), Image.Resampling.LANCZOS, box=box)


def _some_preview() -> Any:
    fit = PreviewFit()
    fit.add(np.zeros((64, 64, 3), np.uint8), np.zeros((4, 8, 8), np.float16))
    return fit.solve()


def measure_free(count: int, rounds: int, threads: int) -> dict[str, Rate]:
    """Pictures per second at 1024 px, with an encoder that costs nothing and with Pillow alone."""
    with tempfile.TemporaryDirectory() as name:
        world = World(Path(name), count, 1, 1024, threads)
        ways: dict[str, Callable[[], int]] = {"Pillow alone": world.pillow, "builder": lambda: world.build(Free(0))}
        return take_turns(ways, rounds)


def measure_slow(count: int, threads: int) -> dict[str, float]:
    """Share of the time that an encoder of 50 ms a batch works, at 256 px; and how fast pictures could have come."""
    with tempfile.TemporaryDirectory() as name:
        world = World(Path(name), count, 0.25, 256, threads)
        encoder = Free(BATCH_S)
        began = time.perf_counter()
        world.pillow()
        pillow_s = time.perf_counter() - began
        world.build(encoder)
    return {
        "busy_share": encoder.busy_share(),
        "encoder_per_s": BATCH / BATCH_S,
        "pillow_per_s": count / pillow_s,
        "batches": len(encoder.busy),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep the numbers where --json says."""
    parser = argparse.ArgumentParser(prog="benchmarks.cache_encode", description="What a build adds to its encoder.")
    parser.add_argument("--count", type=int, default=48, help="pictures of 1.7 MP (default: %(default)s)")
    parser.add_argument("--small-count", type=int, default=640, help="of 0.1 MP (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="that decode (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the numbers")
    options = parser.parse_args(arguments)
    free = measure_free(options.count, options.rounds, options.threads)
    ratio = free["builder"].median / free["Pillow alone"].median
    print(f"\nfree encoder, 1.7 MP to 1 MP, {options.threads} threads")
    for name, rate in free.items():
        print(f"  {name:14} {rate.median:8.1f} pictures/s")
    print(f"  builder / Pillow alone {ratio:8.2f}")
    slow = measure_slow(options.small_count, options.threads)
    print(f"\nencoder of {BATCH_S * 1000:.0f} ms a batch of {BATCH}, {options.threads} threads")
    print(f"  pictures/s: encoder {slow['encoder_per_s']:.0f}, Pillow alone {slow['pillow_per_s']:.0f}")
    print(f"  encoder busy {slow['busy_share']:8.1%}")
    if options.json:
        rates = {name: vars(rate) for name, rate in free.items()}
        options.json.write_text(json.dumps({"free": rates, "ratio": ratio, "slow": slow}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
