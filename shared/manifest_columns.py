"""Rows of a manifest to its columns, mapped and not in memory: 250 bytes of a row, and several times that in Python.

rows -> a few thousand at once -> an unnamed file -> each column whole, in an unnamed file of its own -> manifest.py

A column at a time is in memory while it is made whole. One of the doors to Arrow's files.
"""

import itertools
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from shared.errors import DataError
from shared.manifest_rows import ManifestRow, column_value
from shared.scratch import open_scratch

ROWS_AT_ONCE = 4096


def make_columns(schema: pa.Schema, ordered: Iterable[ManifestRow], folder: Path) -> list[pa.Array]:
    """The columns of the rows `ordered`; the unnamed files are in `folder`.

    Raises DataError where a column of text is more than Arrow's offsets can tell, 2 GiB.
    """
    plain = pa.schema([field.with_type(_plain_type(field.type)) for field in schema])
    table = _mapped(plain, _batches(plain, ordered), folder)
    return [_whole(field, table.column(field.name), folder) for field in schema]


def _batches(schema: pa.Schema, ordered: Iterable[ManifestRow]) -> Iterator[pa.RecordBatch]:
    rest = iter(ordered)
    while some := list(itertools.islice(rest, ROWS_AT_ONCE)):
        columns = [pa.array([column_value(row, field.name) for row in some], field.type) for field in schema]
        yield pa.record_batch(columns, schema=schema)


def _whole(field: pa.Field, pieces: pa.ChunkedArray, folder: Path) -> pa.Array:
    try:
        whole = pieces.combine_chunks()
    except pa.ArrowInvalid as error:  # offsets of 32 bits
        raise DataError(
            f"column {field.name!r} of the manifest has more than 2 GiB of text: give some of the data sets a manifest "
            "of their own (--manifest)"
        ) from error
    if pa.types.is_dictionary(field.type):
        coded = whole.dictionary_encode()
        whole = pa.DictionaryArray.from_arrays(coded.indices.cast(field.type.index_type), coded.dictionary)
    schema = pa.schema([field])
    return _mapped(schema, [pa.record_batch([whole], schema=schema)], folder).column(0).chunk(0)


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
