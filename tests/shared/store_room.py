"""Stores that run out of room: of map, of disk, of address space."""

import mmap
import os
import resource
import subprocess
import time
from collections import Counter
from pathlib import Path

from store_processes import RIGHT, SILENT, TRACEBACK, check_all, forked, in_child, is_right, record_of, status_of

import shared.store
from shared.errors import StoreFull
from shared.store import StoreReader, StoreWriter


def fill_small_map(store: Path, rounds: int) -> dict[str, int]:
    """A writer with a small map grows it; readers with maps that are too small go on without a restart."""
    shared.store.MAP_SIZE_BYTES = 1 << 20
    result, most = Counter(), 60_000
    for index in range(rounds):
        path = store / str(index)
        to_reader, from_writer = os.pipe()
        with StoreWriter(path) as first:
            first.put_many([record_of(0, most)])

        def read(path: Path = path, ready: int = to_reader) -> int:
            with StoreReader(path) as reader:
                with reader.snapshot() as snapshot:
                    before = is_right(snapshot, 0, most)
                os.read(ready, 1)  # the writer has grown the map
                for _ in range(3):
                    with reader.snapshot() as snapshot:
                        after = all(is_right(snapshot, number, most) for number in range(200))
                return RIGHT if before and after else SILENT

        pid = forked(read)
        time.sleep(0.05)

        def write(path: Path = path) -> int:
            with StoreWriter(path) as writer:
                new = sum(writer.put_many([record_of(n, most) for n in range(i, i + 10)]) for i in range(0, 200, 10))
                return RIGHT if new == 199 and writer._env.info()["map_size"] > 4 << 20 else SILENT

        result["grown"] += in_child(write) == RIGHT
        os.write(from_writer, b".")
        result["recovered"] += status_of(pid) == RIGHT
    return dict(result)


def file_limit(store: Path, rounds: int) -> dict[str, int]:
    """RLIMIT_FSIZE stands in for a full disk: the error is StoreFull, nothing acknowledged is lost, and it goes on."""
    result, acknowledged, most = Counter(), mmap.mmap(-1, 8), 60_000

    def known() -> int:
        return int.from_bytes(acknowledged[:8], "little")

    def write(limit_bytes: int) -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
        with StoreWriter(store) as writer:
            for _ in range(3):
                try:
                    while known() < 3000:
                        first = known()
                        writer.put_many([record_of(number, most) for number in range(first, first + 7)])
                        acknowledged[:8] = (first + 7).to_bytes(8, "little")
                except StoreFull:
                    with writer.snapshot() as snapshot:  # the same writer still reads
                        if not all(is_right(snapshot, number, most) for number in range(known())):
                            return SILENT
                    continue
                return TRACEBACK
        return RIGHT

    for index in range(rounds):
        before = known()
        limit = ((store / "data.mdb").stat().st_size if store.exists() else 0) + 1_500_000 + 777 * index
        result["full"] += in_child(lambda limit=limit: write(limit)) == RIGHT
        result["went_on"] += known() > before
        result["kept"] += in_child(lambda: check_all(store, range(known()), most)) == RIGHT
    return {**result, "acknowledged": known()}


def full_disk(mount_point: Path, margin_bytes: int) -> dict[str, int]:
    """A real file system that runs full; run in a mount namespace of its own."""
    shared.store.FREE_MARGIN_BYTES = margin_bytes
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(mount_point)], check=True)
    store, most, known, result = mount_point / "store", 60_000, 0, Counter()
    for size_mib in (40, 56, 0):
        try:
            with StoreWriter(store) as writer:
                for _ in range(3):
                    try:
                        while True:
                            writer.put_many([record_of(number, most) for number in range(known, known + 7)])
                            known += 7
                    except StoreFull as error:
                        result["full"] += 1
                        result["exit_code"] = error.exit_code
        except StoreFull:
            result["refused_to_open"] += 1
        result["kept"] += in_child(lambda known=known: check_all(store, range(known), most)) == RIGHT
        result[f"records_{size_mib}"] = known
        if size_mib:
            subprocess.run(["mount", "-o", f"remount,size={size_mib}m", str(mount_point)], check=True)
    return dict(result)


def no_address_space(store: Path, limit_mib: int) -> dict[str, int]:
    """Under `ulimit -v` the map is halved until it fits."""
    resource.setrlimit(resource.RLIMIT_AS, (limit_mib << 20, limit_mib << 20))
    with StoreWriter(store) as writer:
        writer.put_many([record_of(0, 1000)])
        map_size = writer._env.info()["map_size"]
    return {"map_mib": map_size >> 20, "code": check_all(store, [0], 1000)}
