"""One record <-> bytes: a checked frame, a small header, raw tensors. Nothing is decoded before it is verified.

    offset  0   magic           4 bytes  "SXRC"
            4   frame version   u16      1
            6   reserved        u16      0
            8   header length   u32      bytes of msgpack and padding: the payload starts on a multiple of 64
           12   payload length  u32
           16   key             16 bytes the content key the record is stored under
           32   checksum        16 bytes xxh3-128 over bytes 0..31 and everything after the checksum
           48   header          msgpack map {"kind": str, "tensors": [[name, dtype, shape, offset], ...], "meta": {...}}
          ...   payload         little-endian tensors, C order, each offset a multiple of 64 from the payload's start

Integers little-endian. Version history: 1 (2026), the first. A reader refuses versions it does not know.
"""

import functools
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import xxhash

from shared.errors import RecordCorrupt, RecordNewer

MAGIC = b"SXRC"
FRAME_VERSION = 1
KEY_BYTES = 16
ALIGNMENT = 64
SHORT_BYTES = 160
_PREFIX = struct.Struct("<4sHHII16s")
_HEADER_AT = _PREFIX.size + 16
_DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("float16", "float32", "uint8", "int64")}
_LIMITS = {"max_str_len": 1 << 17, "max_bin_len": 1 << 17, "max_array_len": 1 << 12, "max_map_len": 1 << 10}

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Record:
    """A verified record; `tensors` are read-only views of the bytes it was decoded from, valid as long as those."""

    kind: str
    tensors: Mapping[str, Array]
    meta: Mapping[str, Any]


def encode_record(key: bytes, kind: str, tensors: Mapping[str, Array], meta: Mapping[str, Any]) -> bytes:
    """The framed bytes of one record; tensors are float16, float32, uint8 or int64."""
    table, blocks, offset = [], [], 0
    for name, tensor in tensors.items():
        block = np.ascontiguousarray(tensor, dtype=_DTYPES[tensor.dtype.name]).tobytes()
        table.append([name, tensor.dtype.name, list(tensor.shape), offset])
        blocks.append(_padded(block, len(block)))
        offset += len(blocks[-1])
    header = msgpack.packb({"kind": kind, "tensors": table, "meta": dict(meta)}, use_bin_type=True)
    header = _padded(header, _HEADER_AT + len(header))
    prefix = _PREFIX.pack(MAGIC, FRAME_VERSION, 0, len(header), offset, key)
    checksum = xxhash.xxh3_128(prefix)
    for part in (header, *blocks):
        checksum.update(part)
    return b"".join((prefix, checksum.digest(), header, *blocks))


def decode_record(key: bytes, data: bytes | memoryview) -> Record:
    """Verify `data` and decode it without a copy; raises RecordCorrupt unless it is the record of `key`, whole."""
    view = memoryview(data)
    header_length, payload_length = _verify_frame(key, view)
    payload_at = _HEADER_AT + header_length
    header = _unpack_header(key, view[_HEADER_AT:payload_at])
    try:
        payload = view[payload_at:]
        tensors = _unique([_tensor(payload, payload_length, *row) for row in header["tensors"]])
        return Record(str(header["kind"]), tensors, dict(header["meta"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _corrupt(key, f"its header does not describe its payload ({error})") from None


def verify_frame(key: bytes, data: bytes | memoryview) -> None:
    """Raise RecordCorrupt unless `data` is a whole frame of `key`; its header is not read."""
    _verify_frame(key, memoryview(data))


def frame_checksum(data: bytes | memoryview) -> bytes:
    """The checksum that a frame says it has, 16 bytes; fewer where it is too short to say."""
    return bytes(memoryview(data)[_PREFIX.size : _HEADER_AT])


def _verify_frame(key: bytes, view: memoryview) -> tuple[int, int]:
    if len(view) < _HEADER_AT:
        raise _corrupt(key, f"only {len(view)} bytes long")
    magic, version, _, header_length, payload_length, stored_key = _PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise _corrupt(key, "no record at all (wrong magic)")
    if _HEADER_AT + header_length + payload_length != len(view):  # before the checksum reads on, perhaps past the file
        raise _corrupt(key, "not as long as it says")
    checksum = xxhash.xxh3_128(view[: _PREFIX.size])
    checksum.update(view[_HEADER_AT:])
    if checksum.digest() != view[_PREFIX.size : _HEADER_AT]:
        raise _corrupt(key, "damaged (checksum)")
    if version != FRAME_VERSION:
        reads = f"this program reads version {FRAME_VERSION}: update it"
        raise RecordNewer(f"record {key.hex()} is of frame version {version}; {reads}")
    if stored_key != key:
        raise _corrupt(key, f"the record of another key, {stored_key.hex()}")
    return header_length, payload_length


def _unpack_header(key: bytes, header: memoryview) -> dict[str, Any]:
    try:
        unpacked = _unpack_short(bytes(header)) if len(header) <= SHORT_BYTES else _unpack(header)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise _corrupt(key, f"its header is not msgpack ({error})") from None
    if not isinstance(unpacked, dict):
        raise _corrupt(key, "its header is not a map")
    return unpacked


def _unpack(header: bytes | memoryview) -> Any:
    unpacker = msgpack.Unpacker(
        raw=False, strict_map_key=True, object_pairs_hook=_unique, ext_hook=_refuse_ext, max_ext_len=0, **_LIMITS
    )
    unpacker.feed(header)
    return unpacker.unpack()


_unpack_short = functools.lru_cache(maxsize=1024)(_unpack)  # no caption in it, so that many records have the same


def _tensor(
    payload: memoryview, payload_length: int, name: str, dtype: str, shape: list[int], offset: int
) -> tuple[str, Array]:
    if type(name) is not str or type(shape) is not list:
        raise TypeError(f"name {name!r}, shape {shape!r}")
    for n in (*shape, offset):
        if type(n) is not int or n < 0:
            raise ValueError(f"shape {shape} at {offset}")
    count = math.prod(shape)
    if offset + count * _DTYPES[dtype].itemsize > payload_length:
        raise ValueError(f"tensor {name} runs past the end")
    return name, np.ndarray(shape, _DTYPES[dtype], payload, offset)


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for name, value in pairs:
        if name in unique:
            raise ValueError(f"{name!r} twice")
        unique[name] = value
    return unique


def _refuse_ext(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code}")


def _padded(block: bytes, length: int) -> bytes:
    return block + bytes(-length % ALIGNMENT)


def _corrupt(key: bytes, what: str) -> RecordCorrupt:
    return RecordCorrupt(f"record {key.hex()} is {what}")
