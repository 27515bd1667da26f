"""What earlier scans read, so that a file that has not changed since is not opened again.

    STORE/scans/<blake2b-128 of the data set's id>.scan
        "SXSC", u16 version, u16 0 | a table of pictures | a table of captions | xxh3-128 of all that
        table: u64 n | u64 ends of the names [n] | u64 ends of the values [n] | names | values

look.py asks: path and os.lstat -> digest and facts of a picture; sources ask: -> bytes of a caption. A name holds all
that tells a file from what it was: its size, mtime, ctime, inode and path. An edit that keeps size and mtime moves the
ctime, another file under the name has another inode.

Entries stand in the order in which the scan met them, so that the next scan finds each one behind the last. The file is
mapped: what it knows takes no memory of the process's own.

Disposable: damaged, absent or of another version, everything is read again, and what a build makes is the same.
"""

import contextlib
import hashlib
import itertools
import mmap
import os
import struct
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from shared.atomic import write_atomically

Kind = Literal["picture", "caption"]
State = tuple[int, int, int, int]  # size, mtime_ns, ctime_ns, inode

FOLDER = "scans"
MAGIC, VERSION = b"SXSC", 2
SETTLED_NS = 2_000_000_000  # a file written again within the clock's grain looks unchanged
MAX_VALUE_BYTES = 4096  # longer captions are read each time
MAX_VALUES_BYTES = 1 << 30  # and so are files of data sets beyond this
_KINDS: tuple[Kind, ...] = ("picture", "caption")
_HEAD = struct.Struct("<4sHH")
_COUNT = struct.Struct("<Q")
_STATE = struct.Struct("<qqqQ")
_CHECKSUM_BYTES = 16


class ScanCache:
    """What is known of the files of one data set; knows nothing where `path` is None or `rehash` is asked for."""

    def __init__(self, path: Path | None = None, *, rehash: bool = False) -> None:
        self._path = path
        self._tables = _nothing() if path is None or rehash else _read(path)
        self._values_bytes = 0

    def get(self, kind: Kind, path: str, state: State) -> bytes | None:
        """What was read from `path`, relative to the data set's root, when it was in this state; None where unknown."""
        return self._tables[kind].get(_STATE.pack(*state) + path.encode())

    def has(self, kind: Kind, path: str, state: State) -> bool:
        """Whether `get` would know something; it counts as no meeting with the file."""
        return self._tables[kind].has(_STATE.pack(*state) + path.encode())

    def put(self, kind: Kind, path: str, before: State, after: State, value: bytes) -> None:
        """Remember `value`, which was read from a file between two looks at it, if it has not just been changed."""
        if before == after and time.time_ns() - max(before[1], before[2]) > SETTLED_NS:
            self.learn(kind, path, before, value)

    def learn(self, kind: Kind, path: str, state: State, value: bytes) -> None:
        """Remember `value` of a file whose state is known, in place of what was known of it."""
        is_small = len(value) <= MAX_VALUE_BYTES and self._values_bytes + len(value) <= MAX_VALUES_BYTES
        if self._path is not None and is_small:
            self._values_bytes += len(value)
            self._tables[kind].put(_STATE.pack(*state) + path.encode(), value)

    def save(self) -> None:
        """Write what this scan met, whole or not at all, and forget it; files that are gone are forgotten for good."""
        tables, self._tables = self._tables, _nothing()
        if self._path is None or all(table.is_as_it_was() for table in tables.values()):
            return
        head = _HEAD.pack(MAGIC, VERSION, 0)
        parts = itertools.chain([head], *(tables[kind].parts() for kind in _KINDS))
        with contextlib.suppress(OSError):  # where it cannot be written, the next scan takes longer, nothing else
            self._path.parent.mkdir(exist_ok=True)
            write_atomically(self._path, _with_checksum(parts))


class _Table:
    """Names and values: `count` of them from `at` in `data`, and those that are new."""

    def __init__(self, data: Any = b"", count: int = 0, at: int = 0) -> None:
        self._data, self._count = data, count
        view = memoryview(data)[at : at + 16 * count].cast("Q")
        self._name_ends, self._value_ends = view[:count], view[count:]
        self._names_at = at + 16 * count
        self._values_at = self._names_at + (self._name_ends[-1] if count else 0)
        self.end = self._values_at + (self._value_ends[-1] if count else 0)
        self._next = 0
        self._met = array("q")  # in order: which of `data`, or ~which of the new ones
        self._new: dict[bytes, bytes] = {}
        self._putting = threading.Lock()

    def get(self, name: bytes) -> bytes | None:
        """The value of `name`, which nearly always comes behind the one that was asked for last."""
        at = self._next
        if at >= self._count or self._name(at) != name:
            if name in self._new:
                return self._new[name]
            if (at := self._search(name)) < 0:
                return None
        self._next = at + 1
        self._met.append(at)
        return self._value(at)

    def has(self, name: bytes) -> bool:
        """Whether there is a value."""
        return name in self._new or self._search(name) >= 0

    def put(self, name: bytes, value: bytes) -> None:
        """Keep a value, in place of an older one; from any thread."""
        with self._putting:
            if name not in self._new:
                self._met.append(~len(self._new))
            self._new[name] = value

    def is_as_it_was(self) -> bool:
        """Whether this scan met what `data` holds, in its order, and nothing else."""
        return not self._new and self._met == array("q", range(self._count))

    def parts(self) -> Iterator[bytes]:
        """What the next scan will read."""
        new = list(self._new.items())
        kept = [at for at in dict.fromkeys(self._met) if at < 0 or not self._new or self._name(at) not in self._new]
        yield _COUNT.pack(len(kept))
        for of_known, which in ((self._name, 0), (self._value, 1)):
            lengths = (len(of_known(at) if at >= 0 else new[~at][which]) for at in kept)
            yield np.cumsum(np.fromiter(lengths, "<u8", len(kept)), dtype="<u8").tobytes()
        for of_known, which in ((self._name, 0), (self._value, 1)):
            yield from (of_known(at) if at >= 0 else new[~at][which] for at in kept)

    def _name(self, at: int) -> bytes:
        start = self._names_at + (self._name_ends[at - 1] if at else 0)
        return bytes(self._data[start : self._names_at + self._name_ends[at]])

    def _value(self, at: int) -> bytes:
        start = self._values_at + (self._value_ends[at - 1] if at else 0)
        return bytes(self._data[start : self._values_at + self._value_ends[at]])

    def _search(self, name: bytes) -> int:
        """Which one `name` is, wherever it stands; -1 where it is none."""
        if not self._count:
            return -1
        if not hasattr(self, "_hashes"):
            hashes = (xxhash.xxh3_64_intdigest(self._name(at)) for at in range(self._count))
            found = np.fromiter(hashes, np.uint64, self._count)
            self._order = np.argsort(found, kind="stable")
            self._hashes = found[self._order]
        wanted = np.uint64(xxhash.xxh3_64_intdigest(name))
        first, last = np.searchsorted(self._hashes, wanted), np.searchsorted(self._hashes, wanted, side="right")
        return next((at for at in self._order[first:last].tolist() if self._name(at) == name), -1)


def cache_path(store: Path, dataset_id: str) -> Path:
    """Where the cache of one data set lies in a store."""
    name = hashlib.blake2b(dataset_id.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return store / FOLDER / f"{name}.scan"


def file_state(path: str) -> State:
    """What of the file at `path` changes when it does; raises OSError."""
    seen = os.lstat(path)
    return seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino


def read_remembered(
    cache: ScanCache, kind: Kind, path: str, look: Callable[[], State], read: Callable[[], bytes]
) -> bytes:
    """What `cache` knows of a file, or read() if it knows nothing; raises DataError as read() does."""
    try:
        before = look()
    except OSError:
        return read()  # which says what is wrong
    value = cache.get(kind, path, before)
    if value is None:
        value = read()
        with contextlib.suppress(OSError):
            cache.put(kind, path, before, look(), value)
    return value


def _nothing() -> dict[Kind, _Table]:
    return {kind: _Table() for kind in _KINDS}


def _read(path: Path) -> dict[Kind, _Table]:
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        magic, version, _ = _HEAD.unpack_from(data)
        if (magic, version) != (MAGIC, VERSION) or not _is_whole(data):
            return _nothing()
    except (OSError, ValueError, struct.error):
        return _nothing()
    tables, at = {}, _HEAD.size
    for kind in _KINDS:
        (count,) = _COUNT.unpack_from(data, at)
        tables[kind] = _Table(data, count, at + _COUNT.size)
        at = tables[kind].end
    return tables


def _is_whole(data: mmap.mmap) -> bool:
    with memoryview(data) as view:
        return xxhash.xxh3_128_digest(view[:-_CHECKSUM_BYTES]) == view[-_CHECKSUM_BYTES:]


def _with_checksum(parts: Iterator[bytes]) -> Iterator[bytes]:
    checksum = xxhash.xxh3_128()
    for part in parts:
        checksum.update(part)
        yield part
    yield checksum.digest()
