"""What earlier scans read, so that a file that has not changed since is not opened again.

    STORE/scans/<blake2b-128 of the data set's id>.scan
        "SXSC", u16 version, u16 0 | u64 bytes | pictures | u64 bytes | captions | xxh3-128 of all that
        pictures, captions: u32 n | u32 m | name [n] | value [m], one behind the other

look.py asks: path and os.lstat -> digest and facts of a picture; sources ask: -> bytes of a caption. A name holds all
that tells a file from what it was: its size, mtime, ctime, inode and path. An edit that keeps size and mtime moves the
ctime, another file under the name has another inode.

Entries stand in the order in which the scan met them, so that the next scan finds each one behind the last. The file is
mapped, and what the next scan will read is written to an unnamed one as it is met: no entry takes memory.

Disposable: damaged, absent or of another version, everything is read again, and what a build makes is the same.
"""

import contextlib
import functools
import hashlib
import mmap
import os
import struct
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from shared.atomic import write_atomically
from shared.scratch import Column

Kind = Literal["picture", "caption"]
State = tuple[int, int, int, int]  # size, mtime_ns, ctime_ns, inode
_Entry = tuple[int, bytes, int, int]  # where it begins, its name, where its value begins and ends

FOLDER = "scans"
MAGIC, VERSION = b"SXSC", 3
SETTLED_NS = 2_000_000_000  # a file written again within the clock's grain looks unchanged
MAX_VALUE_BYTES = 4096  # longer captions are read each time
MAX_VALUES_BYTES = 1 << 34  # and so are files of data sets beyond this
_KINDS: tuple[Kind, ...] = ("picture", "caption")
_HEAD = struct.Struct("<4sHH")
_SIZE = struct.Struct("<Q")
_LENGTHS = struct.Struct("<II")
_STATE = struct.Struct("<qqqQ")
_CHECKSUM_BYTES = 16


class ScanCache:
    """What is known of the files of one data set; knows nothing where `path` is None or `rehash` is asked for."""

    def __init__(self, path: Path | None = None, *, rehash: bool = False, remember: bool = True) -> None:
        """Whoever only looks does not `remember`."""
        self._path, self._remember = path, remember and path is not None
        folder = path.parent.parent if path is not None else None
        self._tables = _tables({} if path is None or rehash else _read(path), folder)
        self._values_bytes = 0

    def get(self, kind: Kind, path: str, state: State) -> bytes | None:
        """What was read from `path`, relative to the data set's root, when it was in this state; None where unknown."""
        table = self._tables[kind]
        return table.get(_STATE.pack(*state) + path.encode()) if table.is_known else None

    def has(self, kind: Kind, path: str, state: State) -> bool:
        """Whether `get` would know something; it counts as no meeting with the file."""
        return self._tables[kind].has(_STATE.pack(*state) + path.encode())

    def would_keep(self, before: State) -> bool:
        """Whether anything of a file that was in this state a moment ago can be remembered."""
        return self._remember and time.time_ns() - max(before[1], before[2]) > SETTLED_NS

    def put(self, kind: Kind, path: str, before: State, after: State, value: bytes) -> None:
        """Remember `value`, which was read from a file between two looks at it, if it has not just been changed."""
        if before == after and self.would_keep(before):
            self.learn(kind, path, before, value)

    def learn(self, kind: Kind, path: str, state: State, value: bytes) -> None:
        """Remember `value` of a file whose state is known, in place of what was known of it."""
        is_small = len(value) <= MAX_VALUE_BYTES and self._values_bytes + len(value) <= MAX_VALUES_BYTES
        if self._remember and is_small:
            self._values_bytes += len(value)
            self._tables[kind].put(_STATE.pack(*state) + path.encode(), value)

    def save(self) -> None:
        """Write what this scan met, whole or not at all, and forget it; files that are gone are forgotten for good."""
        tables, self._tables = self._tables, _tables({}, None)
        if not self._remember or all(table.is_as_it_was() for table in tables.values()):
            return
        with contextlib.suppress(OSError):  # where it cannot be written, the next scan takes longer, nothing else
            assert self._path is not None
            self._path.parent.mkdir(exist_ok=True)
            write_atomically(self._path, _with_checksum(_parts(tables)))


class _Table:
    """Entries that earlier scans met, and those that this one meets: the same ones, up to a place, and then others."""

    def __init__(self, known: memoryview, folder: Path | None) -> None:
        self._known, self._folder, self.is_known = known, folder, len(known) > 0
        self._next = 0  # where the entry behind the last one begins
        self._same = 0  # up to where this scan has met what stands in `known`, in its order
        self._others: Column | None = None  # what it has met from there on
        self._last: _Entry | None = None  # met, and not yet counted: its value may be replaced
        self._meeting = threading.Lock()

    def get(self, name: bytes) -> bytes | None:
        """The value of `name`, which nearly always comes behind the one that was asked for last."""
        with self._meeting:
            entry = self._entry(self._next)
            if entry is not None and entry[1] != name:
                entry = self._entry(entry[3])  # one may be gone
            if entry is None or entry[1] != name:
                entry = self._search(name)
            if entry is None:
                return None
            self._count_last()
            self._last, (_, _, value_at, self._next) = entry, entry
            return bytes(self._known[value_at : self._next])

    def has(self, name: bytes) -> bool:
        """Whether earlier scans wrote a value."""
        with self._meeting:
            return self._search(name) is not None

    def put(self, name: bytes, value: bytes) -> None:
        """Keep a value, in place of the one that was met last if it is of this name; from any thread."""
        with self._meeting:
            if self._last is not None and self._last[1] == name:
                self._last = None
            self._count_last()
            self._add(_LENGTHS.pack(len(name), len(value)) + name + value)

    def is_as_it_was(self) -> bool:
        """Whether this scan met what is known, in its order, and nothing else."""
        self._count_last()
        return self._others is None and self._same == len(self._known)

    def met(self) -> list[memoryview]:
        """What the next scan will read."""
        self._count_last()
        return [self._known[: self._same], memoryview(b"") if self._others is None else self._others.view]

    def _count_last(self) -> None:
        if (entry := self._last) is None:
            return
        at, _, _, end = entry
        self._last = None
        if self._others is None and at == self._same:
            self._same = end
        else:
            self._add(self._known[at:end])

    def _add(self, entry: bytes | memoryview) -> None:
        if self._others is None:
            self._others = Column("u1", self._folder)
        self._others.append(entry)

    def _entry(self, at: int) -> _Entry | None:
        if at >= len(self._known):
            return None
        name_length, value_length = _LENGTHS.unpack_from(self._known, at)
        name_at = at + _LENGTHS.size
        value_at = name_at + name_length
        return at, bytes(self._known[name_at:value_at]), value_at, value_at + value_length

    def _search(self, name: bytes) -> _Entry | None:
        """The entry of `name`, wherever it stands."""
        if not self._known:
            return None
        hashes, places = self._index
        wanted = np.uint64(xxhash.xxh3_64_intdigest(name))
        first, last = np.searchsorted(hashes, wanted), np.searchsorted(hashes, wanted, side="right")
        entries = (self._entry(at) for at in places[first:last].tolist())
        return next((entry for entry in entries if entry is not None and entry[1] == name), None)

    @functools.cached_property
    def _index(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Hashes of all names, sorted, and where their entries begin."""
        hashes, places, at = array("Q"), array("Q"), 0
        while (entry := self._entry(at)) is not None:
            hashes.append(xxhash.xxh3_64_intdigest(entry[1]))
            places.append(at)
            at = entry[3]
        order = np.argsort(np.array(hashes, np.uint64), kind="stable")
        return np.array(hashes, np.uint64)[order], np.array(places, np.uint64)[order]


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
        if cache.would_keep(before):
            with contextlib.suppress(OSError):
                cache.put(kind, path, before, look(), value)
    return value


def _tables(known: Mapping[Kind, memoryview], folder: Path | None) -> "dict[Kind, _Table]":
    return {kind: _Table(known.get(kind, memoryview(b"")), folder) for kind in _KINDS}


def _parts(tables: "Mapping[Kind, _Table]") -> Iterator[bytes | memoryview]:
    yield _HEAD.pack(MAGIC, VERSION, 0)
    for kind in _KINDS:
        met = tables[kind].met()
        yield _SIZE.pack(sum(map(len, met)))
        yield from met


def _read(path: Path) -> dict[Kind, memoryview]:
    """The tables in a file; none where it is absent, damaged or of another version."""
    try:
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        magic, version, _ = _HEAD.unpack_from(data)
        if (magic, version) != (MAGIC, VERSION) or not _is_whole(data):
            return {}
    except (OSError, ValueError, struct.error):
        return {}
    tables, at = {}, _HEAD.size
    for kind in _KINDS:
        (size,) = _SIZE.unpack_from(data, at)
        at += _SIZE.size
        tables[kind] = data[at : at + size]
        at += size
    return tables


def _is_whole(data: memoryview) -> bool:
    return xxhash.xxh3_128_digest(data[:-_CHECKSUM_BYTES]) == data[-_CHECKSUM_BYTES:]


def _with_checksum(parts: Iterator[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    checksum = xxhash.xxh3_128()
    for part in parts:
        checksum.update(part)
        yield part
    yield checksum.digest()
