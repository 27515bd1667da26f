"""The door to Parquet: rows of a file in batches of a bounded size, and single pictures again later.

file -> ParquetTable.rows -> Row(number, values) -> table.py, metadata.py
            \\-> PictureShelf: the batches met last; a picture asked for again is found there or read forward to

Pictures are read again in about the order of the scan, so a file is streamed anew for each pass, never held whole.
"""

import weakref
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cache_builder.sources.rows import BadRow, Row
from cache_builder.sources.trees import Tree
from shared.errors import DataError

BATCH_BYTES = 16 << 20  # aimed at, by the mean size of a row
MOST_ROWS = 1024
MOST_PICTURES = 64  # whatever their mean: equal ones are stored once, and a row group's size may be a lie
SHELF_BYTES = 64 << 20
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Embedded:
    """A picture that a row holds itself; `name` is what the row calls it, or ""."""

    name: str


class ParquetTable:
    """The file `path` under a data set's root; raises DataError where it is none."""

    def __init__(self, tree: Tree, path: str) -> None:
        self.path = path
        with _untrusted():
            stream = tree.open(path)
            self._finalize = weakref.finalize(self, stream.close)  # a shelf is dropped with its table open
            self._file = pq.ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False)
            self._schema = self._file.schema_arrow
            footer = self._file.metadata
            self._groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
            self.columns: list[str] = list(self._schema.names)
        if len(set(self.columns)) != len(self.columns):
            raise DataError("a column name stands in it twice")

    def close(self) -> None:
        """Let go of the file."""
        self._finalize()

    def embedded(self, names: Collection[str]) -> list[str]:
        """Those of `names` whose columns hold bytes, or structs of {bytes, path}."""
        return [name for name in names if name in self.columns and _holds_bytes(self._schema.field(name).type)]

    def carried(self, names: Collection[str]) -> list[str]:
        """Those of `names` whose columns hold texts, numbers, booleans or lists of texts."""
        return [name for name in names if name in self.columns and _is_plain(self._schema.field(name).type)]

    def rows(
        self, plain: Collection[str], pictures: Collection[str] = ()
    ) -> Iterator[tuple[Row | BadRow, "Batch | None"]]:
        """Each row with its batch; `plain` columns as values, `pictures` as Embedded, a path or None.

        A row group that is damaged is one BadRow that names its rows, and the next group is read.
        """
        start = 0
        for index, group in enumerate(self._groups):
            try:
                for batch in self._group(index, start, [*plain, *pictures]):
                    yield from ((row, batch) for row in _batch_rows(batch, plain, pictures))
            except DataError as error:
                last = start + group.num_rows - 1
                yield BadRow(start, f"rows {start} to {last} cannot be read: {error}"), None
            start += group.num_rows

    def batches(self, columns: Collection[str], first: int) -> Iterator["Batch"]:
        """Batches from the row group that holds row `first` to the end; raises DataError."""
        start = 0
        for index, group in enumerate(self._groups):
            if start + group.num_rows > first:
                yield from self._group(index, start, columns)
            start += group.num_rows

    def _group(self, index: int, start: int, columns: Collection[str]) -> Iterator["Batch"]:
        group = self._groups[index]
        mean_bytes = max(1, group.total_byte_size // max(1, group.num_rows))
        rows = max(1, min(MOST_PICTURES if self.embedded(columns) else MOST_ROWS, BATCH_BYTES // mean_bytes))
        with _untrusted():
            found = self._file.iter_batches(rows, [index], list(columns), use_threads=False)
        while (data := _next(found)) is not None:
            yield Batch(self.path, start, data)
            start += data.num_rows


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of the file `path`, the first of them `start`."""

    path: str
    start: int
    data: pa.RecordBatch

    def holds(self, path: str, row: int) -> bool:
        """Whether the row `row` of the file `path` is in it."""
        return self.path == path and self.start <= row < self.start + self.data.num_rows


class PictureShelf:
    """The bytes of single rows, from the batches that were met last or from the file again; for several threads."""

    def __init__(self, tree: Tree, max_bytes: int) -> None:
        self._tree, self._max_bytes = tree, max_bytes
        self._lock = Lock()
        self._recent: deque[Batch] = deque()
        self._table: ParquetTable | None = None
        self._ahead: tuple[str, str, int, Iterator[Batch]] | None = None  # file, column, next row, what follows

    def put(self, batch: Batch) -> None:
        """Keep a batch for what is asked next."""
        with self._lock:
            self._keep(batch)

    def read(self, path: str, column: str, row: int) -> bytes:
        """The picture in `column` of row `row` of the file `path` under the root; raises DataError."""
        with self._lock:
            batch = next((b for b in self._recent if b.holds(path, row)), None) or self._find(path, column, row)
        with _untrusted():
            data = _picture_buffer(batch.data.column(column)[row - batch.start])
        if data is None:
            raise DataError("its row holds no bytes any more")
        if data.size > self._max_bytes:
            raise DataError(f"{data.size} bytes, more than {self._max_bytes}")
        return bytes(data)

    def _find(self, path: str, column: str, row: int) -> Batch:
        """Go forward to the row from where the last one was, or from the beginning of its row group."""
        if self._ahead is None or self._ahead[:2] != (path, column) or self._ahead[2] > row:
            if self._table:
                self._table.close()
            self._table = ParquetTable(self._tree, path)
            self._ahead = path, column, 0, self._table.batches([column], row)
        following = self._ahead[3]
        self._ahead = None  # until it is found: what failed is begun anew
        for batch in following:
            self._keep(batch)
            if batch.holds(path, row):
                self._ahead = path, column, batch.start + batch.data.num_rows, following
                return batch
        raise DataError("its row is no longer in the file")

    def _keep(self, batch: Batch) -> None:
        self._recent.append(batch)
        while len(self._recent) > 1 and sum(b.data.nbytes for b in self._recent) > SHELF_BYTES:
            self._recent.popleft()


_NOT_TEXT = object()


def _batch_rows(batch: Batch, plain: Collection[str], pictures: Collection[str]) -> Iterator[Row | BadRow]:
    columns = {name: _values(batch.data.column(name)) for name in plain}
    columns |= {name: _pictures(batch.data.column(name)) for name in pictures}
    for index in range(batch.data.num_rows):
        values = {name: column[index] for name, column in columns.items()}
        bad = next((name for name, value in values.items() if value is _NOT_TEXT), None)
        number = batch.start + index
        yield Row(number, values) if bad is None else BadRow(number, f"column {bad!r} is not UTF-8")


def _values(column: pa.Array) -> list[Any]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_value(cell) for cell in column]


def _value(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return _NOT_TEXT


def _pictures(column: pa.Array) -> list[Embedded | str | None]:
    """For each row its picture: embedded, or the path that a {bytes, path} without bytes gives."""
    if not pa.types.is_struct(column.type):
        return [Embedded("") if cell.is_valid else None for cell in column]
    return [_struct_picture(cell) if cell.is_valid else None for cell in column]


def _struct_picture(cell: pa.StructScalar) -> Embedded | str | None:
    name = _value(cell["path"]) if "path" in cell else None
    name = name if isinstance(name, str) else ""
    return Embedded(name) if cell["bytes"].is_valid else name or None


def _picture_buffer(cell: pa.Scalar) -> pa.Buffer | None:
    return (cell["bytes"] if isinstance(cell, pa.StructScalar) and cell.is_valid else cell).as_buffer()


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return "bytes" in kind.names and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def _is_plain(kind: pa.DataType) -> bool:
    """Whether its values may be captions or travel along."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_text(kind.value_type)
    if pa.types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, _is_text)
    return any(test(kind) for test in tests)


def _is_text(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _next(batches: Iterator[pa.RecordBatch]) -> pa.RecordBatch | None:
    with _untrusted():
        return next(batches, None)


@contextmanager
def _untrusted() -> Iterator[None]:
    """Turns what Arrow raises over a file into DataError."""
    try:
        yield
    except OSError as error:
        if error.strerror:
            raise DataError(f"cannot be read: {error.strerror}") from None
        raise DataError(f"damaged, or not a Parquet file: {_said(error)}") from None
    except (pa.ArrowException, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise DataError(f"damaged, or not a Parquet file: {_said(error)}") from None


def _said(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
