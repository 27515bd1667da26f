"""What a store takes on disk beyond the bytes of its tensors: frames, pages of LMDB, records of facts.

`python -m benchmarks.store_size [--json FILE]` fills stores with what a build keeps of a picture with its caption: the
latents, the text embeds, and a record of facts of each, under keys as evenly spread as digests are.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.store_read import MOMENTS, SAMPLES, SMALL, Layout, sample_bytes, tensors_of
from shared.record import encode_record
from shared.store import StoreReader, StoreWriter

CAPTION = "a photograph of a lighthouse on a rocky shore at dusk, its lamp lit, waves breaking below, long exposure"
THUMBNAIL_SHAPE = (8, 9, 3)
SAMPLES_AT_ONCE = 64  # in one commit
META: Mapping[str, Mapping[str, Any]] = {
    "text": {"caption": CAPTION, "tokens": 24, "truncated": False},
    "text facts": {"tokens": 24, "truncated": False},
    "picture facts": {"original_hw": [1365, 2048]},
}


def records_of(layout: Layout, index: int) -> list[tuple[bytes, bytes]]:
    """The four framed records of one sample."""
    thumbnail = np.zeros(THUMBNAIL_SHAPE, np.uint8)
    tensors: dict[str, dict[str, Any]] = {name: tensors_of(layout, name, index) for name in layout}
    tensors |= {"text facts": {}, "picture facts": {"thumbnail": thumbnail}}
    framed = []
    for kind, named in tensors.items():
        key = hashlib.blake2b(f"{kind} {index}".encode(), digest_size=16).digest()
        framed.append((key, encode_record(key, kind, named, META.get(kind, {}))))
    return framed


def measure(layout: Layout, count: int) -> dict[str, float]:
    """Bytes a sample: of its tensors, of its framed records, and of the pages of the store that hold them."""
    framed_bytes = 0
    with tempfile.TemporaryDirectory() as name:
        with StoreWriter(Path(name) / "store") as store:
            for first in range(0, count, SAMPLES_AT_ONCE):
                indices = range(first, min(count, first + SAMPLES_AT_ONCE))
                records = [record for index in indices for record in records_of(layout, index)]
                framed_bytes += sum(len(value) for _, value in records)
                store.put_many(records)
        with StoreReader(Path(name) / "store") as reader:
            used_bytes = reader.used_bytes()
        file_bytes = (Path(name) / "store" / "data.mdb").stat().st_size
    raw = sample_bytes(layout)
    sizes = {"raw": raw, "framed": framed_bytes / count, "used": used_bytes / count, "file": file_bytes / count}
    return sizes | {"overhead": file_bytes / count / raw - 1}


def main() -> int:
    """Measure, print, and keep the numbers where --json says."""
    parser = argparse.ArgumentParser(prog="benchmarks.store_size", description="Bytes beyond the tensors' own.")
    parser.add_argument("--count", type=int, default=500, help="samples of each size (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the numbers")
    options = parser.parse_args()
    results = {}
    print(f"{'bytes a sample':26} {'tensors':>8} {'records':>8} {'pages':>8} {'file':>8}  beyond the tensors")
    for title, layout in (("1024 px, sample", SAMPLES), ("1024 px, moments", MOMENTS), ("64 px, small model", SMALL)):
        results[title] = sizes = measure(layout, options.count)
        columns = " ".join(f"{sizes[name]:8.0f}" for name in ("raw", "framed", "used", "file"))
        print(f"{title:26} {columns}  {100 * sizes['overhead']:.1f} %")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
