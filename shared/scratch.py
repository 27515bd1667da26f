"""Arrays that are larger than memory should be: rows at the end of each other in an unnamed file, mapped to be read.

What is mapped belongs to the kernel, which takes it back at need. The file has no name, so that it goes with the
process however that ends.
"""

import mmap
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np

WRITTEN_AT_ONCE = 1 << 18  # bytes

Array = np.ndarray[Any, Any]


def open_scratch(folder: Path | None) -> int:
    """A descriptor of an unnamed file in `folder`, or in the system's place for them where that cannot be written."""
    usable = folder is not None and os.access(folder, os.W_OK | os.X_OK)
    with tempfile.TemporaryFile(dir=folder if usable else None) as file:
        return os.dup(file.fileno())


def outside(array: Array, folder: Path | None = None) -> Array:
    """The same rows, read-only, where they take no memory."""
    column = Column(array.dtype, folder)
    at_once = max(1, WRITTEN_AT_ONCE // array.dtype.itemsize)
    for start in range(0, len(array), at_once):
        column.append(array[start : start + at_once].tobytes())
    return column.array


class Column:
    """Rows of one dtype; appended from one thread, read and replaced from any; raises OSError on a full disk."""

    def __init__(self, dtype: Any, folder: Path | None = None) -> None:
        self.dtype = np.dtype(dtype)
        self._folder = folder
        self._file = open_scratch(folder)
        self._pending = bytearray()
        self._written = self._end = 0  # bytes
        self._array: Array = np.empty(0, self.dtype)
        self._view = memoryview(b"")
        weakref.finalize(self, os.close, self._file)

    @property
    def nbytes(self) -> int:
        """Of all rows so far."""
        return self._end

    def __len__(self) -> int:
        return int(self._end // self.dtype.itemsize)

    def append(self, rows: bytes | memoryview) -> int:
        """Add whole rows; returns at which byte they begin."""
        begin = self._end
        self._pending += rows
        self._end = begin + len(rows)
        if self._end - self._written >= WRITTEN_AT_ONCE:
            self._write()
        return begin

    def put(self, at: int, row: bytes) -> None:
        """Replace one row; who has looked at `array` sees it there."""
        self._write()
        self._write_all(row, at * self.dtype.itemsize)

    @property
    def array(self) -> Array:
        """All rows so far, read-only."""
        self._map()
        return self._array

    @property
    def view(self) -> memoryview:
        """Their bytes."""
        self._map()
        return self._view

    def _map(self) -> None:
        self._write()
        if len(self._view) != self._written:
            mapped = mmap.mmap(self._file, self._written, prot=mmap.PROT_READ)
            self._array, self._view = np.frombuffer(mapped, self.dtype), memoryview(mapped)

    def _write(self) -> None:
        if self._pending:
            self._write_all(self._pending, self._written)
            self._written = self._end
            self._pending = bytearray()

    def _write_all(self, data: bytes | bytearray, at: int) -> None:
        with memoryview(data) as view:
            done = 0
            while done < len(view):
                try:
                    done += os.pwrite(self._file, view[done:], at + done)
                except OSError as error:
                    raise OSError(error.errno, error.strerror, str(self._folder or tempfile.gettempdir())) from None
