"""Export and import of a store against copying its file: `python -m benchmarks.transfer [--gib 3] [--to URL]`.

A store of 1024 px samples (moments and text embeds, as a build makes them) with its manifest. Each round, one after the
other: `cp` of data.mdb and fsync; export to an empty place; import into no store. What each reads comes from the disk,
as a store larger than the memory does, and all that is written is synced; with --warm the store that `cp` and the
export read lies in memory. Ratios of one round count; on a disk whose rate varies, more --rounds. With --to s3://...
the server is measured, not the disk.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from benchmarks.store_read import MOMENTS
from benchmarks.store_size import SAMPLES_AT_ONCE, records_of
from cache_builder.transfer.store_export import export_store
from cache_builder.transfer.store_import import import_store
from shared.atomic import sync_file
from shared.manifest import seal_manifest
from shared.manifest_rows import ManifestRow, Variant
from shared.page_cache import drop_cached
from shared.parts import Part
from shared.store import StoreWriter
from tests.stores import settings

PARTS = 8
EDGE = 1024  # pixels


def digest_of(what: str, size: int = 16) -> bytes:
    """As evenly spread as keys and ids are."""
    return hashlib.blake2b(what.encode(), digest_size=size).digest()


def write_store(store: Path, count: int) -> None:
    """`count` samples with their records of facts left out of the manifest's rules, sealed as "main"."""
    with StoreWriter(store) as writer:
        for first in range(0, count + 1, SAMPLES_AT_ONCE):
            indices = range(first, min(count + 1, first + SAMPLES_AT_ONCE))
            writer.put_many([record for index in indices for record in records_of(MOMENTS, index)])
    widths = {"text_widths": (768, 1280), "pooled_width": 1280}
    declared = settings(("pictures",), null_text_key=digest_of(f"text {count}").hex(), prompts={}, **widths)
    seal_manifest(store, "main", declared, list(rows(count)))


def rows(count: int) -> Iterator[ManifestRow]:
    """One crop and one caption each."""
    for index in range(count):
        variant = Variant(digest_of(f"latents {index}"), False, (0, 0), (EDGE, EDGE))
        yield ManifestRow(
            dataset="pictures",
            sample_id=digest_of(f"sample {index}"),
            path=f"{index}.jpg",
            image_digest=digest_of(f"picture {index}", 32),
            original_hw=(1365, 2048),
            bucket_hw=(EDGE, EDGE),
            variants=(variant,),
            text_keys=(digest_of(f"text {index}"),),
            split="train",
        )


def main() -> int:
    """Measure, print, and keep the numbers where --json says."""
    parser = argparse.ArgumentParser(prog="benchmarks.transfer", description="Export and import against cp and fsync.")
    parser.add_argument("--gib", type=float, default=3, help="size of the store (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="times each is measured (default: %(default)s)")
    parser.add_argument("--warm", action="store_true", help="leave in memory what cp and the export read")
    parser.add_argument("--to", metavar="URL", help="export there, not beside the store; it must be empty")
    parser.add_argument(
        "--folder", type=Path, help="where to work; the disk that is measured (default: a temporary one)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the numbers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        work = Path(name)
        sample_bytes = sum(len(value) for _, value in records_of(MOMENTS, 0))
        write_store(work / "store", max(1, round(options.gib * 2**30 / sample_bytes)))
        rates = measure(work, options.rounds, options.to, options.warm)
    for title, reached in rates.items():
        print(f"{title:24} {median(reached):7.0f} MB/s", end="")
        ratio = median(rate / copied for rate, copied in zip(reached, rates["cp and fsync"], strict=True))
        print(f"   {ratio:5.2f} of cp   ({', '.join(f'{rate:.0f}' for rate in reached)})")
    if options.json:
        options.json.write_text(json.dumps(rates, indent=1) + "\n")
    return 0


def measure(work: Path, rounds: int, to: str | None, is_warm: bool) -> dict[str, list[float]]:
    """MB/s of the store's bytes in each round; of a part, of the bytes that it has."""
    store, size = work / "store", (work / "store/data.mdb").stat().st_size
    rates: dict[str, list[float]] = {}
    for number in range(rounds):
        address = f"{to}/{number}" if to else str(work / "export")
        part_bytes: list[int] = []
        ways: dict[str, tuple[Callable[[], object], Callable[[], int]]] = {
            "cp and fsync": (lambda: copy_file(store / "data.mdb", work / "copy"), lambda: size),
            "export": (lambda address=address: export_store(store, address), lambda: size),
            "import": (lambda address=address: import_store(address, work / "in"), lambda: size),
            f"import of part 0/{PARTS}": (
                lambda address=address, kept=part_bytes: kept.append(
                    import_store(address, work / "part", part=Part(0, PARTS)).bytes
                ),
                lambda kept=part_bytes: kept[0],
            ),
        }
        for title, (way, done_bytes) in ways.items():
            if not is_warm:
                forget(store, work / "export")
            began_s = time.perf_counter()
            way()
            elapsed_s = time.perf_counter() - began_s
            rates.setdefault(title, []).append(done_bytes() / elapsed_s / 1e6)
        for left in ("copy", "export", "in", "part"):
            path = work / left
            path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
        os.sync()
    return rates


def forget(*folders: Path) -> None:
    """Let what the folders hold go from memory."""
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        drop_cached(path, 0, path.stat().st_size)


def copy_file(source: Path, target: Path) -> None:
    """What a careful person types."""
    subprocess.run(["cp", "--reflink=never", source, target], check=True)
    sync_file(target)


if __name__ == "__main__":
    sys.exit(main())
