"""Records: what goes in comes out, and of anything that was touched on the way nothing but RecordCorrupt comes out."""

import random
import struct
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shared.errors import RecordCorrupt
from shared.record import ALIGNMENT, FRAME_VERSION, MAGIC, Record, decode_record, encode_record

KEY = bytes(range(16))
PREFIX = struct.Struct("<4sHHII16s")
HEADER_AT = 48

arrays = st.sampled_from(["float16", "float32", "uint8", "int64"]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)
json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def example_record() -> bytes:
    source = np.random.default_rng(0)
    tensors = {
        "mean": source.standard_normal((4, 9, 7)).astype(np.float16),
        "ids": source.integers(0, 1000, 6),
        "pixels": source.integers(0, 256, (5, 3), dtype=np.uint8),
        "logvar": source.standard_normal((4, 9, 7)).astype(np.float32),
    }
    return encode_record(KEY, "latent", tensors, {"caption": "a red circle é🦊", "tokens": 5, "truncated": False})


def framed(header: bytes, payload: bytes = bytes(256), *, version: int = FRAME_VERSION, key: bytes = KEY) -> bytes:
    """A frame around any header, its checksum right."""
    prefix = PREFIX.pack(MAGIC, version, 0, len(header), len(payload), key)
    return prefix + xxhash.xxh3_128(prefix + header + payload).digest() + header + payload


def framed_table(*rows: Any) -> bytes:
    return framed(msgpack.packb({"kind": "latent", "tensors": list(rows), "meta": {}}))


def equal(one: Record, other: Record) -> bool:
    same = one.tensors.keys() == other.tensors.keys() and (one.kind, one.meta) == (other.kind, other.meta)
    return same and all(np.array_equal(one.tensors[name], other.tensors[name], equal_nan=True) for name in one.tensors)


@given(
    st.dictionaries(st.text(max_size=20), arrays, max_size=4),
    st.dictionaries(st.text(max_size=20), json_like, max_size=4),
    st.text(max_size=20),
    st.binary(min_size=16, max_size=16),
)
def test_round_trip(tensors: dict[str, np.ndarray], meta: dict[str, Any], kind: str, key: bytes) -> None:
    data = encode_record(key, kind, tensors, meta)
    assert len(data) % ALIGNMENT == 0
    record = decode_record(key, data)
    assert (record.kind, record.meta) == (kind, meta)
    assert record.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        stored = record.tensors[name]
        assert (stored.dtype, stored.shape) == (tensor.dtype, tensor.shape)
        assert stored.tobytes() == tensor.tobytes()  # as bytes: NaNs keep their payload


def test_layouts_and_byte_orders_of_memory_do_not_count() -> None:
    plain = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for tensor in (np.asfortranarray(plain), plain.astype(">f4"), np.repeat(plain, 2, axis=2)[:, :, ::2]):
        assert encode_record(KEY, "k", {"t": tensor}, {}) == encode_record(KEY, "k", {"t": plain}, {})


def test_tensors_lie_on_multiples_of_64() -> None:
    data = example_record()
    for tensor in decode_record(KEY, data).tensors.values():
        at = tensor.__array_interface__["data"][0] - np.frombuffer(data, np.uint8).__array_interface__["data"][0]
        assert at % ALIGNMENT == 0


def test_views_cannot_be_written_through() -> None:
    tensors = decode_record(KEY, example_record()).tensors
    assert not any(tensor.flags.writeable for tensor in tensors.values())


def test_the_frame_is_as_documented() -> None:
    data = example_record()
    magic, version, reserved, header_length, payload_length, key = PREFIX.unpack_from(data)
    assert (magic, version, reserved, key) == (b"SXRC", 1, 0, KEY)
    assert HEADER_AT + header_length + payload_length == len(data)
    header = msgpack.Unpacker(raw=False)
    header.feed(data[HEADER_AT:])
    assert header.unpack()["tensors"][0][:3] == ["mean", "float16", [4, 9, 7]]


# --- what was touched ---


def mutations(data: bytes, source: random.Random) -> Callable[[], bytes]:
    other = encode_record(bytes(16), "latent", {"mean": np.ones((4, 9, 7), np.float16)}, {})

    def flip_bit() -> bytes:
        at = source.randrange(len(data) * 8)
        return data[: at // 8] + bytes([data[at // 8] ^ (1 << at % 8)]) + data[at // 8 + 1 :]

    def set_byte() -> bytes:
        at = source.randrange(len(data))
        return data[:at] + bytes([data[at] ^ source.randrange(1, 256)]) + data[at + 1 :]

    def cut() -> bytes:
        return data[: source.randrange(len(data))]

    def cut_front() -> bytes:
        return data[source.randrange(1, len(data)) :]

    def extend() -> bytes:
        return data + source.randbytes(source.choice([1, 16, 64, 4096]))

    def zero_stretch() -> bytes:
        first = source.randrange(len(data) - 64)
        changed = data[:first] + bytes(64) + data[first + 64 :]
        return changed if changed != data else flip_bit()

    def graft() -> bytes:
        at = source.randrange(1, min(len(data), len(other)))
        changed = data[:at] + other[at:]
        return changed if changed != data else flip_bit()

    def swap_blocks() -> bytes:
        a, b = sorted(source.sample(range(0, len(data) - 63, 64), 2))
        changed = data[:a] + data[b : b + 64] + data[a + 64 : b] + data[a : a + 64] + data[b + 64 :]
        return changed if changed != data else flip_bit()

    def noise() -> bytes:
        return source.randbytes(source.randrange(5000))

    kinds = [flip_bit, set_byte, cut, cut_front, extend, zero_stretch, graft, swap_blocks, noise]
    return lambda: source.choice(kinds)()


@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_mutations_are_corrupt_and_nothing_else(count: int) -> None:
    mutate = mutations(example_record(), random.Random(18))
    for _ in range(count):
        mutated = mutate()
        for form in (mutated, memoryview(mutated)):
            with pytest.raises(RecordCorrupt):
                decode_record(KEY, form)


@pytest.mark.parametrize("count", [2_000, pytest.param(50_000, marks=pytest.mark.slow)])
def test_hostile_headers_under_a_right_checksum(count: int) -> None:
    """The checksum is no signature: a header that decodes must still stay within its payload."""
    original = example_record()
    length = PREFIX.unpack_from(original)[3]
    header, payload = original[HEADER_AT : HEADER_AT + length], original[HEADER_AT + length :]
    source = random.Random(19)
    refused = 0
    for _ in range(count):
        changed = bytearray(header)
        for _ in range(source.randint(1, 6)):
            changed[source.randrange(len(changed))] = source.randrange(256)
        try:
            record = decode_record(KEY, framed(bytes(changed), payload))
        except RecordCorrupt:
            refused += 1
        else:
            assert all(tensor.nbytes <= len(payload) for tensor in record.tensors.values())
            assert all(isinstance(name, str) for name in record.tensors)
    assert refused > count / 2


GOOD_ROW = ["t", "uint8", [4], 0]
HOSTILE_ROWS = {
    "runs past the end": [["t", "uint8", [257], 0]],
    "begins past the end": [["t", "uint8", [1], 4096]],
    "begins at the end": [["t", "float32", [1], 256]],
    "negative offset": [["t", "uint8", [4], -4]],
    "negative shape": [["t", "uint8", [-4], 0]],
    "two negatives": [["t", "uint8", [-2, -2], 0]],
    "huge count": [["t", "uint8", [2**63, 2**63], 0]],
    "product that would wrap to 0": [["t", "uint8", [2**32, 2**32], 0]],
    "empty but huge": [["t", "uint8", [0, 2**63], 0]],
    "empty past the end": [["t", "uint8", [0], 10**30 % 2**63]],
    "too many dimensions": [["t", "uint8", [1] * 100, 0]],
    "object dtype": [["t", "object", [4], 0]],
    "unknown dtype": [["t", "float64", [4], 0]],
    "dtype string": [["t", "<f4", [4], 0]],
    "dtype is a list": [["t", ["float32"], [4], 0]],
    "dtype is nil": [["t", None, [4], 0]],
    "shape is a number": [["t", "uint8", 4, 0]],
    "shape is text": [["t", "uint8", "", 0]],
    "shape is bytes": [["t", "uint8", b"\x04", 0]],
    "shape is a map": [["t", "uint8", {}, 0]],
    "shape of floats": [["t", "uint8", [4.0], 0]],
    "shape of booleans": [["t", "uint8", [True], 0]],
    "offset is a float": [["t", "uint8", [4], 0.0]],
    "offset is true": [["t", "uint8", [4], True]],
    "offset is nil": [["t", "uint8", [4], None]],
    "name is a number": [[7, "uint8", [4], 0]],
    "name is bytes": [[b"t", "uint8", [4], 0]],
    "name is nil": [[None, "uint8", [4], 0]],
    "name is a list": [[["t"], "uint8", [4], 0]],
    "same name twice": [GOOD_ROW, GOOD_ROW],
    "row too short": [GOOD_ROW[:3]],
    "row too long": [[*GOOD_ROW, 0]],
    "row is a number": [4],
    "row is text": ["tuso"],
    "row is a map": [{"name": "t"}],
}


def test_the_good_row_is_good() -> None:
    assert decode_record(KEY, framed_table(GOOD_ROW)).tensors["t"].shape == (4,)


@pytest.mark.parametrize("rows", HOSTILE_ROWS.values(), ids=HOSTILE_ROWS.keys())
def test_hostile_tables_of_tensors(rows: list[Any]) -> None:
    with pytest.raises(RecordCorrupt, match=KEY.hex()):
        decode_record(KEY, framed_table(*rows))


def packed(**changed: Any) -> bytes:
    return msgpack.packb({"kind": "k", "tensors": [GOOD_ROW], "meta": {}} | changed)


HOSTILE_HEADERS = {
    "nothing": b"",
    "nil": b"\xc0",
    "a list": msgpack.packb([1, 2]),
    "a number": b"\x07",
    "never used": b"\xc1",
    "random": random.Random(1).randbytes(300),
    "no tensors": msgpack.packb({"kind": "k", "meta": {}}),
    "no kind": msgpack.packb({"tensors": [], "meta": {}}),
    "no meta": msgpack.packb({"kind": "k", "tensors": []}),
    "keys of bytes": msgpack.packb({b"kind": "k", b"tensors": [], b"meta": {}}),
    "keys of numbers": msgpack.packb({1: "k", 2: [], 3: {}}),
    "key twice": b"\x84" + b"".join(map(msgpack.packb, ["kind", "k", "tensors", [], "meta", {}, "kind", "z"])),
    "tensors is nil": packed(tensors=None),
    "tensors is a number": packed(tensors=3),
    "tensors is text": packed(tensors="abcd"),
    "tensors is a map": packed(tensors={"abcd": 1}),
    "meta is a number": packed(meta=3),
    "meta is text": packed(meta="abc"),
    "meta key twice": packed(meta=None)[:-1] + b"\x82\xa1a\x01\xa1a\x02",
    "extension": packed(meta={"x": msgpack.ExtType(5, b"abc")}),
    "empty extension": packed(meta={"x": msgpack.ExtType(5, b"")}),
    "timestamp": packed(meta={"x": msgpack.Timestamp(1, 2)}),
    "list nesting bomb": b"\x83\xa4kind" + b"\x91" * 100_000 + b"\xc0",
    "map nesting bomb": b"\x81\xa1a" * 100_000 + b"\xc0",
    "list of 2**32 - 1": b"\x83\xa4kind\xdd\xff\xff\xff\xff",
    "map of 2**32 - 1": b"\xdf\xff\xff\xff\xff",
    "text of 2**32 - 1": b"\x83\xa4kind\xdb\xff\xff\xff\xff",
    "bytes of 2**32 - 1": b"\x83\xa4kind\xc6\xff\xff\xff\xff",
    "extension of 2**32 - 1": b"\x83\xa4kind\xc9\xff\xff\xff\xff\x05",
    "many lists of many": b"\x83\xa4kind" + b"\xdc\x0f\xff" * 500,
    "cut short": packed()[:-3],
    "text that is not utf-8": packed(kind="k").replace(b"\xa1k\xa7", b"\xa1\xff\xa7"),
}


@pytest.mark.parametrize("header", HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS.keys())
def test_hostile_headers(header: bytes) -> None:
    with pytest.raises(RecordCorrupt, match=KEY.hex()):
        decode_record(KEY, framed(header))


@pytest.mark.parametrize("length_at", [8, 12])
@pytest.mark.parametrize("value", [0, 1, 2**31, 2**32 - 1])
def test_lengths_that_lie_under_a_right_checksum(length_at: int, value: int) -> None:
    data = bytearray(example_record())
    struct.pack_into("<I", data, length_at, value)
    data[32:48] = xxhash.xxh3_128(bytes(data[:32] + data[48:])).digest()
    with pytest.raises(RecordCorrupt, match="not as long as it says"):
        decode_record(KEY, bytes(data))


def test_a_newer_frame_says_update() -> None:
    with pytest.raises(RecordCorrupt, match=r"frame version 2.*update"):
        decode_record(KEY, framed(packed(), version=2))


def test_another_keys_record_names_it() -> None:
    with pytest.raises(RecordCorrupt, match=f"another key, {KEY.hex()}"):
        decode_record(bytes(16), example_record())


def test_something_else_altogether() -> None:
    with pytest.raises(RecordCorrupt, match="wrong magic"):
        decode_record(KEY, b"PK\x03\x04" + bytes(100))
    with pytest.raises(RecordCorrupt, match="only 47 bytes"):
        decode_record(KEY, bytes(47))


def test_no_object_is_ever_encoded() -> None:
    for tensor in (np.array([object()]), np.zeros(3), np.array(["text"]), np.zeros(2, "datetime64[s]")):
        with pytest.raises(KeyError):
            encode_record(KEY, "k", {"t": tensor}, {})
    with pytest.raises(TypeError):
        encode_record(KEY, "k", {}, {"meta": object()})


def test_the_same_record_is_the_same_bytes() -> None:
    assert example_record() == example_record()
    assert equal(decode_record(KEY, example_record()), decode_record(KEY, bytearray(example_record())))
