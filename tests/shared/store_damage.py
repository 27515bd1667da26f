"""Damage to data.mdb, and what the pre-flight makes of files that are sound."""

import random
import time
from collections import Counter
from pathlib import Path

from store_processes import REFUSED, RIGHT, SILENT, TRACEBACK, check_all, in_child, is_right, key_of, record_of

from shared.errors import StoreError
from shared.preflight import check_data_file
from shared.store import StoreWriter

PAGE_BYTES = 4096
_NAMES = {RIGHT: "right", REFUSED: "refused", SILENT: "silent", TRACEBACK: "traceback"}


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
