"""Tensors from safetensors file to safetensors file, one at a time: renamed, cut, joined or cast, never all in memory.

    read_lazily(files) -> LazyTensor by name -> cast_to, rows_of, ... -> write_lazily(file)

A model of 13 GB is rewritten in the memory of its largest tensor. Nothing is interpreted but dtype and shape.
"""

import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shared.errors import DataError
from shared.weights import read_header

if TYPE_CHECKING:
    from torch import Tensor

FloatDtype = Literal["F32", "F16", "BF16"]
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose bytes are read when they are asked for."""

    dtype: str  # by safetensors' name: "F32", "BF16"
    shape: tuple[int, ...]
    read: Callable[[], bytes]  # in C order, little-endian

    @property
    def size_bytes(self) -> int:
        """What it takes in a file."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def read_lazily(files: Sequence[Path]) -> dict[str, LazyTensor]:
    """The tensors of safetensors files by name; raises DataError where a file is not whole."""
    return {name: _stored(file, entry, start) for file in files for name, entry, start in read_header(file)}


def read_metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says of itself, {} where it says nothing; raises DataError where it is not whole."""
    read_header(file)  # that it is whole
    with file.open("rb") as handle:
        header = json.loads(handle.read(struct.unpack("<Q", handle.read(8))[0]))
    said = header.get("__metadata__")
    return {str(key): str(value) for key, value in said.items()} if isinstance(said, dict) else {}


def from_tensor(tensor: "Tensor") -> LazyTensor:
    """A tensor that is in memory already; floats of 32 or 16 bits."""
    import torch

    dtype = next(name for name, own in _TORCH.items() if getattr(torch, own) == tensor.dtype)
    flat = tensor.detach().cpu().contiguous().view(-1)
    return LazyTensor(dtype, tuple(tensor.shape), lambda: flat.view(torch.uint8).numpy().tobytes())


def reshaped(tensor: LazyTensor, *shape: int) -> LazyTensor:
    """The same bytes in another shape."""
    if math.prod(shape) != math.prod(tensor.shape):
        raise DataError(f"a tensor of shape {tensor.shape} cannot be taken as {shape}")
    return replace(tensor, shape=shape)


def rows_of(tensor: LazyTensor, begin: int, end: int) -> LazyTensor:
    """Rows [begin, end) along the first axis."""
    row_bytes = tensor.size_bytes // tensor.shape[0]
    return LazyTensor(
        tensor.dtype,
        (end - begin, *tensor.shape[1:]),
        lambda: tensor.read()[begin * row_bytes : end * row_bytes],
    )


def joined(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """Tensors of one dtype and one shape of rows, one after the other along the first axis."""
    rows = sum(tensor.shape[0] for tensor in tensors)
    return LazyTensor(
        tensors[0].dtype, (rows, *tensors[0].shape[1:]), lambda: b"".join(tensor.read() for tensor in tensors)
    )


def mixed(one: LazyTensor, other: LazyTensor, share: float) -> LazyTensor:
    """(1 - share) one + share other, added in fp32 and rounded to one's dtype; raises DataError where shapes differ."""
    if one.shape != other.shape or one.dtype not in _TORCH or other.dtype not in _TORCH:
        raise DataError(f"{one.dtype} {one.shape} and {other.dtype} {other.shape} cannot be mixed")

    def read() -> bytes:
        return _rounded(values_of(one).float().lerp(values_of(other).float(), share), one.dtype)

    return LazyTensor(one.dtype, one.shape, read)


def transposed(tensor: LazyTensor) -> LazyTensor:
    """A matrix, turned."""
    import numpy as np

    def read() -> bytes:
        items = np.frombuffer(tensor.read(), dtype=f"u{ITEM_BYTES[tensor.dtype]}").reshape(tensor.shape)
        return items.T.tobytes()

    return LazyTensor(tensor.dtype, tensor.shape[::-1], read)


def cast_to(tensor: LazyTensor, dtype: FloatDtype | None) -> LazyTensor:
    """Rounded to another float dtype; whole numbers, and everything where `dtype` is None, stay as they are."""
    if dtype is None or tensor.dtype == dtype or tensor.dtype not in _TORCH:
        return tensor

    return LazyTensor(dtype, tensor.shape, lambda: _rounded(values_of(tensor), dtype))


def values_of(tensor: LazyTensor) -> "Tensor":
    """A tensor of floats in memory, flat."""
    import torch

    data = bytearray(tensor.read())
    return torch.frombuffer(data, dtype=getattr(torch, _TORCH[tensor.dtype])) if data else torch.empty(0)


def _rounded(values: "Tensor", dtype: str) -> bytes:
    import torch

    data: bytes = values.to(getattr(torch, _TORCH[dtype])).view(torch.uint8).numpy().tobytes()
    return data


def file_bytes(tensors: Mapping[str, LazyTensor]) -> int:
    """What a file of these tensors takes, its header roughly counted."""
    return sum(tensor.size_bytes + 200 for tensor in tensors.values())


def write_lazily(path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> str:
    """Write a safetensors file, synced; returns its sha256, hex.

    Wide dtypes come first, then names, as the library has it: so every tensor lies on a multiple of its item's size.
    """
    order = sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name].dtype], name))
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for data in _pieces(order, tensors, metadata):
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _pieces(order: Sequence[str], tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> Iterator[bytes]:
    yield _header(order, tensors, metadata)
    for name in order:
        yield _whole(name, tensors[name])


def _header(order: Sequence[str], tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    reached = 0
    for name in order:
        begin, reached = reached, reached + tensors[name].size_bytes
        header[name] = {
            "dtype": tensors[name].dtype,
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, reached],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _whole(name: str, tensor: LazyTensor) -> bytes:
    data = tensor.read()
    if len(data) != tensor.size_bytes:
        raise DataError(f"{name} has {len(data)} bytes, its shape {tensor.shape} needs {tensor.size_bytes}")
    return data


def _stored(file: Path, entry: Mapping[str, Any], start: int) -> LazyTensor:
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in ITEM_BYTES:
        raise DataError(f"{file} holds a tensor of {entry['dtype']}, which this program does not rewrite")

    def read() -> bytes:
        if begin == end:
            return b""
        with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return mapped[start + begin : start + end]

    return LazyTensor(entry["dtype"], tuple(entry["shape"]), read)
