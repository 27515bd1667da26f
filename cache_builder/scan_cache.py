"""What earlier scans read, so that a file that has not changed since is not opened again.

    STORE/scans/<blake2b-128 of the data set's id>.scan
        "SXSC", u16 version, xxh3-128 of the rest | u64 n | n keys of 16 bytes | n lengths, u16 | values in order

look.py asks: path and os.lstat -> digest of a picture; sources ask: -> bytes of a caption. A key is blake2b-128 over
all that tells a file from what it was: its path, size, mtime, ctime and inode. An edit that keeps size and mtime moves
the ctime, another file under the name has another inode.

Disposable: damaged, absent or of another version, everything is read again, and what a build makes is the same.
"""

import contextlib
import hashlib
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from shared.atomic import write_atomically

Kind = Literal["picture", "caption"]
State = tuple[int, int, int, int]  # size, mtime_ns, ctime_ns, inode

FOLDER = "scans"
MAGIC, VERSION = b"SXSC", 1
SETTLED_NS = 2_000_000_000  # a file written again within the clock's grain looks unchanged
MAX_VALUE_BYTES = 4096  # longer captions are read each time
MAX_VALUES_BYTES = 256 << 20  # and so are those of data sets beyond this
_HEAD = struct.Struct("<4sH16s")
_COUNT = struct.Struct("<Q")
_STATE = struct.Struct("<qqqQ")


class ScanCache:
    """What is known of the files of one data set; knows nothing where `path` is None or `rehash` is asked for."""

    def __init__(self, path: Path | None = None, *, rehash: bool = False) -> None:
        self._path = path
        self._known = {} if path is None or rehash else _read(path)
        self._met: dict[bytes, bytes] = {}
        self._values_bytes = 0

    def get(self, kind: Kind, path: str, state: State) -> bytes | None:
        """What was read from `path`, relative to the data set's root, when it was in this state; None where unknown."""
        key = _key(kind, path, state)
        value = self._met.get(key)
        if value is None and (value := self._known.pop(key, None)) is not None:
            self._keep(key, value)
        return value

    def put(self, kind: Kind, path: str, before: State, after: State, value: bytes) -> None:
        """Remember `value`, which was read from a file between two looks at it, if it has not just been changed."""
        if self._path is not None and before == after and time.time_ns() - max(before[1], before[2]) > SETTLED_NS:
            self._keep(_key(kind, path, before), value)

    def save(self) -> None:
        """Write what this scan met, whole or not at all, and forget it; files that are gone are forgotten for good."""
        met, self._met, self._known = self._met, {}, {}
        if self._path is None:
            return
        lengths = np.fromiter(map(len, met.values()), "<u2", len(met)).tobytes()
        body = b"".join((_COUNT.pack(len(met)), *met, lengths, *met.values()))
        head = _HEAD.pack(MAGIC, VERSION, xxhash.xxh3_128_digest(body))
        with contextlib.suppress(OSError):  # where it cannot be written, the next scan takes longer, nothing else
            self._path.parent.mkdir(exist_ok=True)
            write_atomically(self._path, head + body)

    def _keep(self, key: bytes, value: bytes) -> None:
        if len(value) <= MAX_VALUE_BYTES and self._values_bytes + len(value) <= MAX_VALUES_BYTES:
            self._values_bytes += len(value)
            self._met[key] = value


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


def _key(kind: Kind, path: str, state: State) -> bytes:
    message = kind[:1].encode() + _STATE.pack(*state) + path.encode()
    return hashlib.blake2b(message, digest_size=16).digest()


def _read(path: Path) -> dict[bytes, bytes]:
    try:
        data = path.read_bytes()
        magic, version, checksum = _HEAD.unpack_from(data)
        body = memoryview(data)[_HEAD.size :]
        if (magic, version) != (MAGIC, VERSION) or xxhash.xxh3_128_digest(body) != checksum:
            return {}
        (count,) = _COUNT.unpack_from(body)
        ends = (
            _COUNT.size + 18 * count + np.cumsum(np.frombuffer(body, "<u2", count, _COUNT.size + 16 * count), dtype=int)
        )
    except (OSError, ValueError, struct.error):
        return {}
    return _entries(body, count, ends.tolist())


def _entries(body: memoryview, count: int, ends: list[int]) -> dict[bytes, bytes]:
    known, start = {}, _COUNT.size + 18 * count
    for index, end in enumerate(ends):
        at = _COUNT.size + 16 * index
        known[bytes(body[at : at + 16])] = bytes(body[start:end])
        start = end
    return known
