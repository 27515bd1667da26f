"""Rows of a manifest to its columns, mapped and not in memory: 250 bytes of a row, and several times that in Python.

rows -> a few thousand at once -> an unnamed file -> each column whole, buffer by buffer in unnamed files -> manifest.py

Arrow would make a column whole in memory: what it joins is as large as the column, a gigabyte of ten million rows. So
its buffers are put at the end of each other here. One of the doors to Arrow's files.
"""

import itertools
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shared.errors import DataError
from shared.manifest_rows import ManifestRow, column_value
from shared.scratch import Array, Column, open_scratch

ROWS_AT_ONCE = 1024  # as objects of Python, a kilobyte and a half each


def make_columns(schema: pa.Schema, ordered: Iterable[ManifestRow], folder: Path) -> list[pa.Array]:
    """The columns of the rows `ordered`; the unnamed files are in `folder`.

    Raises DataError where a column of text is more than Arrow's offsets can tell, 2 GiB.
    """
    plain = pa.schema([field.with_type(_plain_type(field.type)) for field in schema])
    table = _mapped(plain, _batches(plain, ordered), folder)
    return [_whole(field.type, table.column(field.name).chunks, folder) for field in schema]


def _batches(schema: pa.Schema, ordered: Iterable[ManifestRow]) -> Iterator[pa.RecordBatch]:
    rest = iter(ordered)
    while some := list(itertools.islice(rest, ROWS_AT_ONCE)):
        columns = [pa.array([column_value(row, field.name) for row in some], field.type) for field in schema]
        yield pa.record_batch(columns, schema=schema)


def _whole(kind: pa.DataType, pieces: Sequence[pa.Array], folder: Path) -> pa.Array:
    """One array of all `pieces`, mapped; in memory only where it is small, or has rows without a value."""
    if pa.types.is_dictionary(kind):
        return _coded(kind, pieces, folder)
    if not pieces or any(piece.null_count for piece in pieces) or pa.types.is_boolean(kind):
        return pa.chunked_array(pieces, kind).combine_chunks()
    if pa.types.is_struct(kind):
        columns = zip(*(piece.flatten() for piece in pieces), strict=True)
        whole = [_whole(field.type, column, folder) for field, column in zip(kind, columns, strict=True)]
        return pa.StructArray.from_arrays(whole, fields=list(kind))
    if pa.types.is_fixed_size_list(kind):
        values = _whole(kind.value_type, [piece.flatten() for piece in pieces], folder)
        return pa.FixedSizeListArray.from_arrays(values, type=kind)
    if pa.types.is_list(kind):
        values = _whole(kind.value_type, [piece.flatten() for piece in pieces], folder)
        return pa.ListArray.from_arrays(pa.array(_offsets(pieces, folder)), values, type=kind)
    count = sum(len(piece) for piece in pieces)
    if pa.types.is_string(kind):
        return pa.StringArray.from_buffers(count, pa.py_buffer(_offsets(pieces, folder)), _bytes(pieces, folder))
    return pa.Array.from_buffers(kind, count, [None, _bytes(pieces, folder)])


def _offsets(pieces: Sequence[pa.Array], folder: Path) -> Array:
    """Where each value of all `pieces` begins, and where the last one ends, int32."""
    begins, end = Column(np.int32, folder), 0
    begins.append(bytes(4))
    for piece in pieces:
        first, *_ = ends = _own_offsets(piece)
        before, end = end, end + int(ends[-1] - first)
        if end >= 1 << 31:
            raise DataError(
                "a column of the manifest has more than 2 GiB of text (paths are one): give some of the data sets a "
                "manifest of their own (--manifest)"
            )
        begins.append((ends[1:] - first + before).tobytes())
    return begins.array


def _bytes(pieces: Sequence[pa.Array], folder: Path) -> pa.Buffer:
    """What the values of all `pieces` are made of, one after the other."""
    found = Column(np.uint8, folder)
    for piece in pieces:
        if pa.types.is_string(piece.type):
            first, last = (int(at) for at in _own_offsets(piece)[[0, -1]])
            found.append(memoryview(piece.buffers()[2])[first:last] if last > first else b"")
        else:
            width = piece.type.bit_width // 8
            found.append(memoryview(piece.buffers()[1])[piece.offset * width : (piece.offset + len(piece)) * width])
    return pa.py_buffer(found.view)


def _own_offsets(piece: pa.Array) -> Array:
    offsets = np.frombuffer(piece.buffers()[1], np.int32)
    return offsets[piece.offset : piece.offset + len(piece) + 1]


def _coded(kind: pa.DictionaryType, pieces: Sequence[pa.Array], folder: Path) -> pa.Array:
    """Each value as its place among the different ones, in the order in which they are met."""
    places: dict[Any, int] = {}
    codes = Column(kind.index_type.to_pandas_dtype(), folder)
    for piece in pieces:
        coded = piece.dictionary_encode()
        own = np.array([places.setdefault(value, len(places)) for value in coded.dictionary.to_pylist()], codes.dtype)
        codes.append(own[coded.indices.to_numpy()].tobytes())
    values = pa.array(list(places), kind.value_type)
    return pa.DictionaryArray.from_arrays(pa.array(codes.array), values)


def _mapped(schema: pa.Schema, batches: Iterable[pa.RecordBatch], folder: Path) -> pa.Table:
    with os.fdopen(open_scratch(folder), "r+b") as file:
        with pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        file.flush()
        return pa.ipc.open_file(pa.py_buffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))).read_all()


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """What a dictionary is of: a file has one for all of its batches, and which it will be is known at the end."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind
