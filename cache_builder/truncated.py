"""How many captions were cut short, without a record read for each: what was read once is remembered beside the store.

    STORE/scans/truncated.known    "SXTK", u16 version, u16 0 | u64 n | n text keys, sorted | n bytes, 0 or 1 | xxh3-128

Disposable. It cannot be wrong of a key that it knows: a text key names the caption and its tokenizers.
"""

import contextlib
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from cache_builder.scan_cache import FOLDER
from cache_builder.todo import KEYS_AT_ONCE, batches, known_count
from shared.atomic import write_atomically
from shared.store import Store

FILE = "truncated.known"
MAGIC, VERSION = b"SXTK", 1
_HEAD = struct.Struct("<4sHHQ")
_CHECKSUM_BYTES = 16

Keys = np.ndarray[Any, np.dtype[np.bytes_]]
Flags = np.ndarray[Any, np.dtype[np.uint8]]


def count_truncated(store: Store, keys: Sequence[bytes]) -> int:
    """How many of the captions with these text keys, no two alike, are longer than their encoders take."""
    path = store.path / FOLDER / FILE
    known, flags = _read(path)
    wanted = np.array(keys, "S16")
    at = np.searchsorted(known, wanted)
    is_known = np.zeros(len(wanted), bool)
    is_known[at < len(known)] = known[at[at < len(known)]] == wanted[at < len(known)]
    count = int(flags[at[is_known]].sum())
    unknown = [keys[index] for index in np.flatnonzero(~is_known).tolist()]
    found = {key: flag for batch in batches(unknown, KEYS_AT_ONCE) for key, flag in _ask(store, batch).items()}
    if found:
        _write(path, np.concatenate([known, np.array([*found], "S16")]), np.concatenate([flags, [*found.values()]]))
    return count + sum(found.values())


def _ask(store: Store, keys: Sequence[bytes]) -> dict[bytes, bool]:
    with store.snapshot() as snapshot:
        found = ((key, known_count(snapshot, key)) for key in keys)
        return {key: tokens.truncated for key, tokens in found if tokens is not None}  # a count for people


def _read(path: Path) -> tuple[Keys, Flags]:
    try:
        data = path.read_bytes()
        magic, version, _, count = _HEAD.unpack_from(data)
        if (magic, version) == (MAGIC, VERSION) and xxhash.xxh3_128_digest(data[:-_CHECKSUM_BYTES]) == data[-16:]:
            at = _HEAD.size + 16 * count
            return np.frombuffer(data, "S16", count, _HEAD.size), np.frombuffer(data, np.uint8, count, at)
    except (OSError, ValueError, struct.error):
        pass
    return np.zeros(0, "S16"), np.zeros(0, np.uint8)


def _write(path: Path, keys: Keys, flags: Flags) -> None:
    order = np.argsort(keys, kind="stable")
    body = _HEAD.pack(MAGIC, VERSION, 0, len(keys)) + keys[order].tobytes() + flags[order].astype(np.uint8).tobytes()
    with contextlib.suppress(OSError):  # where it cannot be written, the next build reads the records again
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, body + xxhash.xxh3_128_digest(body))
