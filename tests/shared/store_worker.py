"""The other processes of the store's tests: `python store_worker.py COMMAND STORE [ARGUMENT...]` prints JSON.

Kept free of torch, so that a fork costs a millisecond. Records are a function of their number: whoever reads one knows
what it must hold.
"""

import functools
import hashlib
import json
import mmap
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import shared.store
from shared.errors import ExpertsError, StoreBusy, StoreError, StoreFull, StoreLocked
from shared.preflight import check_data_file
from shared.record import encode_record
from shared.store import Snapshot, StoreReader, StoreWriter

RIGHT, REFUSED, SILENT, TRACEBACK = 0, 1, 2, 3
PAGE_BYTES = 4096


def key_of(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


@functools.lru_cache(200)
def tensor_of(number: int, most_bytes: int) -> np.ndarray:
    source = random.Random(number)
    return np.frombuffer(source.randbytes(source.randint(1, most_bytes)), np.uint8)


def record_of(number: int, most_bytes: int) -> tuple[bytes, bytes]:
    key = key_of(number)
    return key, encode_record(key, "test", {"t": tensor_of(number, most_bytes)}, {"number": number})


def is_right(snapshot: Snapshot, number: int, most_bytes: int) -> bool:
    expected = tensor_of(number, most_bytes)
    target = np.empty_like(expected)
    meta = snapshot.copy_into(key_of(number), {"t": target})
    copy = snapshot.read(key_of(number))
    return (
        meta == copy.meta == {"number": number}
        and np.array_equal(target, expected)
        and np.array_equal(copy.tensors["t"], expected)
    )


# --- forks ---


def forked(work: Callable[[], int]) -> int:
    """Run `work` in a child; its pid."""
    pid = os.fork()
    if pid == 0:
        code = TRACEBACK
        try:
            code = work()
        except BaseException:  # noqa: BLE001 - told, and then the child ends whatever it was
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    return pid


def status_of(pid: int) -> int:
    """Exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(work: Callable[[], int]) -> int:
    return status_of(forked(work))


def check_all(store: Path, numbers: Sequence[int], most_bytes: int) -> int:
    """Read every record, as a fresh process would."""
    try:
        with StoreReader(store) as reader, reader.snapshot() as snapshot:
            return RIGHT if all(is_right(snapshot, number, most_bytes) for number in numbers) else SILENT
    except StoreError:
        return REFUSED


# --- commands ---


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


def damage(store: Path, kind: str, count: int, seed: int) -> dict[str, int]:
    """Damage data.mdb in place, read everything in a child, and heal it again."""
    time.sleep = lambda seconds: None  # the pre-flight waits before it looks again
    data, source, result = store / "data.mdb", random.Random(seed), Counter()
    numbers, most = range(120), 9000
    with StoreWriter(store) as writer:
        for first in numbers[::10]:
            writer.put_many([record_of(number, most) for number in range(first, first + 10)])
    sound = data.read_bytes()
    tree = _tree_pages(sound)
    for _ in range(count):
        with data.open("r+b") as file:
            for at, changed in _damage(kind, sound, tree, source):
                file.seek(at)
                file.write(changed) if changed else file.truncate()
        code = in_child(lambda: check_all(store, numbers, most))
        result[_NAMES.get(code, f"signal {-code}")] += 1
        with data.open("r+b") as file:
            file.write(sound)
    result["sound_after"] = int(in_child(lambda: check_all(store, numbers, most)) == RIGHT)
    return {"tree_pages": len(tree), "pages": len(sound) // PAGE_BYTES, **result}


_NAMES = {RIGHT: "right", REFUSED: "refused", SILENT: "silent", TRACEBACK: "traceback"}


def _tree_pages(sound: bytes) -> list[int]:
    """Branch and leaf pages; overflow pages say how many they are, and those that follow the first are raw."""
    tree, at = [], 2
    while at * PAGE_BYTES < len(sound):
        page = sound[at * PAGE_BYTES :][:16]
        flags = int.from_bytes(page[10:12], "little")
        tree += [at] if flags & 3 else []
        at += int.from_bytes(page[12:16], "little") if flags & 4 else 1
    return tree


def _damage(kind: str, sound: bytes, tree: list[int], source: random.Random) -> list[tuple[int, bytes]]:
    """What to write where; nothing cuts the file there."""
    count = len(sound) // PAGE_BYTES
    pages = {"meta": [0, 1], "tree": tree, "payload": sorted(set(range(2, count)) - set(tree))}.get(kind, range(count))
    at = source.choice(pages) * PAGE_BYTES
    if kind == "zeroed":
        return [(at, bytes(PAGE_BYTES))]
    if kind == "swapped":
        other = source.choice(pages) * PAGE_BYTES
        return [(at, sound[other : other + PAGE_BYTES]), (other, sound[at : at + PAGE_BYTES])]
    if kind == "truncated":
        return [(source.randrange(len(sound)), b"")]
    at += source.randrange(152 if kind == "meta" else PAGE_BYTES)
    return [(at, bytes([sound[at] ^ 1 << source.randrange(8)]))]


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


def preflight_after_commits(store: Path, commits: int) -> dict[str, int]:
    """No commit leaves a file that looks cut short: puts of all sizes, and deletions in transactions of their own."""
    source, result, present, number = random.Random(2), Counter(), [], 0
    with StoreWriter(store) as writer:
        for commit in range(commits):
            most = source.choice([1, 200, 1500, 2100, 9000, 300_000])
            count = source.randint(1, 40) if most < 300_000 else 2
            writer.put_many([record_of(n, most) for n in range(number, number + count)])
            present += [(n, most) for n in range(number, number + count)]
            number += count
            _look(store, result)
            if commit % 7 == 6:
                source.shuffle(present)
                cut = len(present) - source.randint(0, len(present))
                result["deleted"] += writer.delete_many([key_of(n) for n, _ in present[cut:]])
                del present[cut:]
                _look(store, result)
        with writer.snapshot() as snapshot:
            result["right"] = int(all(is_right(snapshot, *item) for item in present))
    return {**result, "present": len(present)}


def gc_of_fresh_stores(folder: Path, count: int) -> dict[str, int]:
    """Large deletions from a store without free pages: the pages they use last are counted but never written."""
    source, result = random.Random(3), Counter()
    for index in range(count):
        store, most = folder / str(index), source.choice([10, 200, 1500, 2100])
        numbers = list(range(source.randint(100, 1500)))
        with StoreWriter(store) as writer:
            writer.put_many([record_of(number, most) for number in numbers])
            source.shuffle(numbers)
            while numbers:
                cut = source.randint(0, len(numbers) - 1)
                result["deleted"] += writer.delete_many([key_of(number) for number in numbers[cut:]])
                del numbers[cut:]
                _look(store, result)
                writer.close_environment()
                with writer.snapshot() as snapshot:
                    result["wrong"] += not all(is_right(snapshot, number, most) for number in numbers)
    return dict(result)


def _look(store: Path, result: Counter) -> None:
    try:
        check_data_file(store / "data.mdb")
    except StoreError:
        result["refused"] += 1
    else:
        result["sound"] += 1


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


def read_some(store: Path, first: int, count: int, most_bytes: int) -> dict[str, int]:
    return {"code": check_all(store, range(first, first + count), most_bytes)}


def main() -> int:
    command, store, *arguments = sys.argv[1:]
    values = [float(value) if "." in value else int(value) if value.isdigit() else value for value in arguments]
    try:
        result = globals()[command](Path(store), *values)
    except ExpertsError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return error.exit_code
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
