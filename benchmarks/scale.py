"""A manifest of ten million rows and a store of a million small records, really made; the rest is reckoned.

`python -m benchmarks.scale [--rows 10000000] [--records 1000000] [--folder DIR] [--json FILE]`, a quarter of an hour
on a free machine and 5 GB of disk; `--table` prints docs/scale.md's tables alone (benchmarks/sizing.py). Of the
manifest: what sealing costs, and what two trainers at once find (benchmarks/scale_readers.py), warm and cold. Times by
the clock mean little on a machine that does something else; processor times and memory stand.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.own_memory import Watch
from benchmarks.scale_readers import measure_readers, memory_mb, write_first_batches
from benchmarks.scale_rows import GeneratedRows, settings_of
from benchmarks.sizing import Costs, table_text
from shared.manifest import seal_manifest
from shared.record import encode_record
from shared.store import StoreReader, StoreWriter

EDGE = 8  # of the small latents: mean and log-variance of 64 px
COMMITTED = 4096  # records at once
READ = 20_000  # records that are read back, at random
SHAPE = (4, EDGE, EDGE)


def measure_sealing(store: Path, count: int) -> dict[str, float]:
    """Seconds by the clock and of the processor, MB of memory at the most, and bytes, of a manifest of `count` rows."""
    before, at_s, cpu_s = memory_mb()["Anonymous"], time.perf_counter(), time.process_time()
    watch = Watch()
    manifest = seal_manifest(store, "main", settings_of(), GeneratedRows(count), in_order=True)
    return {
        "rows": count,
        "seal_s": time.perf_counter() - at_s,
        "seal_cpu_s": time.process_time() - cpu_s,
        "most_anonymous_mb": watch.stop() / 1e6 - before,
        "bytes": manifest.path.stat().st_size,
    }


def measure_records(store: Path, count: int) -> dict[str, float]:
    """`count` small records really written, each commit synced, and some of them read back in random order."""
    tensors = {name: np.zeros(SHAPE, np.float16) for name in ("mean", "logvar")}
    at_s, cpu_s = time.perf_counter(), time.process_time()
    with StoreWriter(store) as writer:
        for first in range(0, count, COMMITTED):
            keys = sorted(_key(index) for index in range(first, min(first + COMMITTED, count)))
            writer.put_many([(key, encode_record(key, "latents", tensors, {})) for key in keys])
    written_s, written_cpu_s = time.perf_counter() - at_s, time.process_time() - cpu_s
    asked = np.random.default_rng(0).integers(0, count, READ).tolist()
    targets = {"mean": np.empty(SHAPE, np.float16), "logvar": np.empty(SHAPE, np.float16)}
    with StoreReader(store) as reader:
        at_s, cpu_s = time.perf_counter(), time.process_time()
        for first in range(0, READ, 8):
            with reader.snapshot() as snapshot:
                for index in asked[first : first + 8]:
                    snapshot.copy_into(_key(index), targets)
        read_s, read_cpu_s = time.perf_counter() - at_s, time.process_time() - cpu_s
        found = reader.count()
    return {
        "records": found,
        "bytes": (store / "data.mdb").stat().st_size,
        "written_per_s": count / written_s,
        "written_per_cpu_s": count / written_cpu_s,
        "read_per_s": READ / read_s,
        "read_per_cpu_s": READ / read_cpu_s,
    }


def _key(index: int) -> bytes:
    """As evenly spread as digests are: a store that is filled in order is another case."""
    return (index * 0x9E3779B97F4A7C15F39CC0605CEDC835 % (1 << 128)).to_bytes(16, "big")


def measure(folder: Path, rows: int, records: int) -> dict[str, Any]:
    """All of it."""
    found: dict[str, Any] = {"sealing": measure_sealing(folder / "manifest", rows)}
    write_first_batches(folder / "manifest")
    for name, cold in (("warm", False), ("cold", True)):
        found[f"two readers, {name}"] = measure_readers(folder / "manifest", cold=cold)
    found["records"] = measure_records(folder / "records", records)
    return found


def show(found: dict[str, Any]) -> None:
    """What was measured, a line for each process."""
    for title, values in found.items():
        for one in values if isinstance(values, list) else [values]:
            print(f"{title}: " + ", ".join(f"{name} {value:.4g}" for name, value in one.items()))


def main() -> int:
    """Measure and print, or print the tables."""
    parser = argparse.ArgumentParser(prog="benchmarks.scale", description="Large manifests and stores.")
    parser.add_argument("--rows", type=int, default=10_000_000, help="of the manifest (default: %(default)s)")
    parser.add_argument("--records", type=int, default=1_000_000, help="of the store (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary place)")
    parser.add_argument("--table", action="store_true", help="print the tables of docs/scale.md, and measure nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the numbers")
    options = parser.parse_args()
    if options.table:
        print(table_text(Costs()))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        found = measure(Path(name), options.rows, options.records)
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
