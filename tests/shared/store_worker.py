"""The other processes of the store's tests: `python store_worker.py COMMAND STORE [ARGUMENT...]` prints JSON."""

import json
import mmap
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from store_damage import damage, gc_of_fresh_stores, preflight_after_commits
from store_processes import REFUSED, RIGHT, SILENT, check_all, forked, in_child, is_right, key_of, record_of, status_of
from store_room import file_limit, fill_small_map, full_disk, no_address_space

import shared.store
from shared.errors import ExpertsError, StoreBusy, StoreLocked
from shared.preflight import check_data_file
from shared.store import StoreReader, StoreWriter


def kill_loop(store: Path, kills: int, seed: int) -> dict[str, int]:
    """kill -9 of a writer in its commit loop; what it said was stored must be there and right, always."""
    source, most, result = random.Random(seed), 60_000, Counter()
    acknowledged: set[int] = set()

    def write(first: int, ack: int) -> int:
        with StoreWriter(store) as writer:
            for number in range(first, first + 10_000, 4):
                writer.put_many([record_of(n, most) for n in range(number, number + 4)])
                os.write(ack, f"{number}\n".encode())
        return 0

    def check(numbers: Sequence[int]) -> bool:
        return in_child(lambda: check_present(store, numbers, acknowledged, most)) == RIGHT

    for _ in range(kills):
        first = max(acknowledged, default=-1) + 1
        read_end, write_end = os.pipe()
        pid = forked(lambda first=first, ack=write_end: write(first, ack))
        os.close(write_end)
        time.sleep(source.uniform(0.005, 0.08))
        os.kill(pid, signal.SIGKILL)
        result["killed"] += status_of(pid) == -signal.SIGKILL
        with os.fdopen(read_end) as pipe:
            acknowledged |= {int(line) + i for line in pipe.read().split() for i in range(4)}
        result["faults"] += not check(range(first, max(acknowledged, default=-1) + 6))  # and what it did not say
    result["faults"] += not check(range(max(acknowledged) + 6))
    return {**result, "acknowledged": len(acknowledged)}


def check_present(store: Path, numbers: Sequence[int], acknowledged: set[int], most_bytes: int) -> int:
    """Acknowledged records are there; what else is there is right too."""
    if not (store / "store.json").exists() and not acknowledged:
        return RIGHT
    with StoreReader(store) as reader, reader.snapshot() as snapshot:
        for number in numbers:
            present = snapshot.has(key_of(number))
            if (number in acknowledged and not present) or (present and not is_right(snapshot, number, most_bytes)):
                return SILENT
    return RIGHT


def kill_creation(folder: Path, kills: int) -> dict[str, int]:
    """kill -9 while a store is being made: the next writer makes it all the same."""
    source, result = random.Random(1), Counter()
    for index in range(kills):
        store = folder / f"store-{index}"

        def write(store: Path = store) -> int:
            StoreWriter(store).put_many([record_of(0, 100)])
            return 0

        pid = forked(write)
        time.sleep(source.uniform(0, 0.012))
        os.kill(pid, signal.SIGKILL)
        result["killed"] += status_of(pid) == -signal.SIGKILL
        result["without_card"] += store.exists() and not (store / "store.json").exists()
        result["faults"] += in_child(write) != 0
        result["faults"] += in_child(lambda store=store: check_all(store, [0], 100)) != RIGHT
    return dict(result)


def kill_readers(store: Path, rounds: int) -> dict[str, int]:
    """Eight readers fill a table of eight: a ninth is told; when they are dead it takes their places."""
    shared.store.MAX_READERS = 8
    with StoreWriter(store) as writer:
        writer.put_many([record_of(0, 100)])
    result = Counter()
    read_end, write_end = os.pipe()

    def survivor() -> int:
        with StoreReader(store) as reader:
            for _ in range(rounds):
                with reader.snapshot() as snapshot:
                    right = is_right(snapshot, 0, 100)
                pids = [forked(lambda: stall(reader, write_end)) for _ in range(8)]
                for _ in pids:
                    os.read(read_end, 1)
                try:
                    with reader.snapshot():
                        return SILENT
                except StoreBusy:
                    pass
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                    status_of(pid)
                with reader.snapshot() as snapshot:
                    right = right and is_right(snapshot, 0, 100)
                if not right:
                    return SILENT
        return RIGHT

    result["survivor"] = in_child(survivor)
    for _ in range(3):
        result["newcomers"] += in_child(lambda: check_all(store, [0], 100)) == RIGHT
    return dict(result)


def stall(reader: StoreReader, ack: int) -> int:
    with reader.snapshot() as snapshot:
        snapshot.has(key_of(0))
        os.write(ack, b".")
        time.sleep(60)
    return 0


def stalled_reader(store: Path, commits: int) -> dict[str, float]:
    """How much longer the file gets under a reader that never ends its snapshot."""
    sizes = {}
    for name in ("alone", "stalled"):
        path = store / name
        with StoreWriter(path) as writer:
            writer.put_many([record_of(0, 60_000)])
        pid = 0
        if name == "stalled":
            read_end, write_end = os.pipe()
            pid = forked(lambda path=path, ack=write_end: stall(StoreReader(path), ack))
            os.read(read_end, 1)
        with StoreWriter(path) as writer:
            for first in range(1, commits * 8, 8):
                writer.put_many([record_of(number, 100_000) for number in range(first, first + 8)])
        if pid:
            os.kill(pid, signal.SIGKILL)
            status_of(pid)
        sizes[name] = (path / "data.mdb").stat().st_size
    return {"ratio": sizes["stalled"] / sizes["alone"], "bytes": sizes["alone"]}


def fork_under_way(store: Path) -> dict[str, int]:
    """A child of a process with an open store opens its own; the parent goes on."""
    writer = StoreWriter(store)
    writer.put_many([record_of(0, 5000)])
    with writer.snapshot() as snapshot:
        assert is_right(snapshot, 0, 5000)

    def child() -> int:
        with writer.snapshot() as snapshot:
            right = is_right(snapshot, 0, 5000)
        return RIGHT if right else SILENT

    codes = [in_child(child) for _ in range(3)]
    writer.put_many([record_of(1, 5000)])
    with writer.snapshot() as snapshot:
        right = is_right(snapshot, 0, 5000) and is_right(snapshot, 1, 5000)
    rival = in_child(lambda: _rival(store))
    writer.close()
    with StoreReader(store) as reader:
        with reader.snapshot() as snapshot:
            right = right and is_right(snapshot, 1, 5000)
        codes += [in_child(lambda: RIGHT if _reads(reader) else SILENT) for _ in range(3)]
        right = right and _reads(reader)
    return {"children_right": codes.count(RIGHT), "parent_right": int(right), "rival_refused": int(rival == REFUSED)}


def _reads(reader: StoreReader) -> bool:
    with reader.snapshot() as snapshot:
        return is_right(snapshot, 0, 5000) and is_right(snapshot, 1, 5000)


def _rival(store: Path) -> int:
    try:
        StoreWriter(store).close()
    except StoreLocked:
        return REFUSED
    return SILENT


def together(store: Path, seconds: float) -> dict[str, int]:
    """One writer, two readers and a pre-flight at once."""
    most = 40_000
    with StoreWriter(store) as writer:
        writer.put_many([record_of(0, most)])
    progress = mmap.mmap(-1, 8)  # number of records that the writer has been told are stored, shared by all

    def known() -> int:
        return int.from_bytes(progress[:8], "little")

    progress[:8] = (1).to_bytes(8, "little")
    end_s = time.monotonic() + seconds

    def write() -> int:
        with StoreWriter(store) as writer:
            while time.monotonic() < end_s:
                first = known()
                writer.put_many([record_of(number, most) for number in range(first, first + 5)])
                progress[:8] = (first + 5).to_bytes(8, "little")
        return RIGHT

    def read(seed: int, reopen: bool) -> int:
        source, reader = random.Random(seed), StoreReader(store)
        while time.monotonic() < end_s:
            numbers = [source.randrange(known()) for _ in range(5)]
            with reader.snapshot() as snapshot:
                if not all(is_right(snapshot, number, most) for number in numbers):
                    return SILENT
            if reopen:
                reader.close()
                reader = StoreReader(store)  # looks at the file first
        return RIGHT

    def look() -> int:
        while time.monotonic() < end_s:
            check_data_file(store / "data.mdb")
        return RIGHT

    pids = [forked(write), forked(look), forked(lambda: read(1, True)), forked(lambda: read(2, False))]
    codes = [status_of(pid) for pid in pids]
    return {"right": codes.count(RIGHT), "processes": len(pids), "records": known()}


def hold(store: Path) -> dict[str, int]:
    """Hold the lease until stdin ends."""
    with StoreWriter(store):
        sys.stdout.write("held\n")
        sys.stdout.flush()
        sys.stdin.read()
    return {}


def open_snapshot(store: Path) -> dict[str, int]:
    """Hold a snapshot until stdin ends; an error gives its exit code."""
    try:
        with StoreReader(store) as reader, reader.snapshot() as snapshot:
            right = is_right(snapshot, 0, 100)
            sys.stdout.write(f"pid {os.getpid()}\n")
            sys.stdout.flush()
            sys.stdin.read()
    except StoreBusy as error:
        sys.stdout.write(f"busy {error}\n")
        return {"exit_code": error.exit_code}
    return {"right": int(right)}


def write_some(store: Path, first: int, count: int, most_bytes: int, wait: int) -> dict[str, int]:
    with StoreWriter(store, wait=bool(wait)) as writer:
        return {"new": writer.put_many([record_of(number, most_bytes) for number in range(first, first + count)])}


COMMANDS = {
    command.__name__: command
    for command in (
        *(damage, file_limit, fill_small_map, fork_under_way, full_disk, gc_of_fresh_stores, hold, kill_creation),
        *(kill_loop, kill_readers, no_address_space, open_snapshot, preflight_after_commits, stalled_reader),
        *(together, write_some),
    )
}


def main() -> int:
    command, store, *arguments = sys.argv[1:]
    values = [float(value) if "." in value else int(value) if value.isdigit() else value for value in arguments]
    try:
        result = COMMANDS[command](Path(store), *values)
    except ExpertsError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return error.exit_code
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
