"""How many captions were cut short, without a record read for each: what was read once is remembered beside the store.

    STORE/scans/truncated.known    "SXTK", u16 version, u16 0 | u64 n | n text keys, sorted | n bytes, 0 or 1 | xxh3-128

Disposable. It cannot be wrong of a key that it knows: a text key names the caption and its tokenizers.
"""

import contextlib
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from cache_builder.key_arrays import KEY_DTYPE, Indices, Keys, each, first_of_each, is_in, parts
from cache_builder.keys import text_facts_key
from cache_builder.report import BuildReport
from cache_builder.samples import Samples
from cache_builder.scan_cache import FOLDER
from shared.atomic import write_atomically
from shared.errors import RecordCorrupt
from shared.record import KEY_BYTES
from shared.snapshot import Snapshot
from shared.store import Store

FILE = "truncated.known"
MAGIC, VERSION = b"SXTK", 1
UNKNOWN = -1
_HEAD = struct.Struct("<4sHHQ")
_CHECKSUM_BYTES = 16

Told = np.ndarray[Any, np.dtype[np.int8]]


def count_texts(report: BuildReport, samples: Samples, tell: Callable[[Indices], Told]) -> None:
    """Count captions and prompts, and how many of them are cut short, as `tell` says of different texts."""
    count = int(samples.rows["text_count"].sum())
    captions = first_of_each(samples.texts["key"][:count])
    prompts = np.arange(count, len(samples.texts) - 1)  # the last is the empty one
    report.captions, report.unique_captions, report.prompts = count, len(captions), len(prompts)
    report.truncated, report.truncated_prompts = (int((tell(texts) == 1).sum()) for texts in (captions, prompts))


def tell_truncated(store: Store, keys: Keys, *, remember: bool) -> Told:
    """Whether each of the captions with these text keys, no two alike, is longer than its encoders take.

    1, 0, or UNKNOWN where no record says; whoever only looks does not `remember`.
    """
    path = store.path / FOLDER / FILE
    known, flags = _read(path)
    told = np.full(len(keys), UNKNOWN, np.int8)
    is_known = is_in(keys, known)
    told[is_known] = flags[np.searchsorted(known, keys[is_known])]
    asked = np.flatnonzero(~is_known)
    for some in parts(asked):
        with store.snapshot() as snapshot:
            told[some] = [_ask(snapshot, key) for key in each(keys[some])]
    learnt = asked[told[asked] != UNKNOWN]
    if remember and len(learnt):
        _write(path, np.concatenate([known, keys[learnt]]), np.concatenate([flags, told[learnt]]))
    return told


def _ask(snapshot: Snapshot, key: bytes) -> int:
    try:
        return bool(snapshot.read(text_facts_key(key)).meta["truncated"])
    except RecordCorrupt:
        return UNKNOWN


def _read(path: Path) -> tuple[Keys, Told]:
    try:
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        magic, version, _, count = _HEAD.unpack_from(data)
        if (magic, version) == (MAGIC, VERSION) and xxhash.xxh3_128_digest(data[:-_CHECKSUM_BYTES]) == data[-16:]:
            at = _HEAD.size + KEY_BYTES * count
            return np.frombuffer(data, KEY_DTYPE, count, _HEAD.size), np.frombuffer(data, np.int8, count, at)
    except (OSError, ValueError, struct.error):
        pass
    return np.zeros(0, KEY_DTYPE), np.zeros(0, np.int8)


def _write(path: Path, keys: Keys, flags: Told) -> None:
    order = np.argsort(keys, kind="stable")
    parts = [_HEAD.pack(MAGIC, VERSION, 0, len(keys)), keys[order].tobytes(), flags[order].tobytes()]
    checksum = xxhash.xxh3_128()
    for part in parts:
        checksum.update(part)
    with contextlib.suppress(OSError):  # where it cannot be written, the next build reads the records again
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, iter([*parts, checksum.digest()]))
