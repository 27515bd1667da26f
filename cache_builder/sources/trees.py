"""What a data set's root is: a folder on a disk or a prefix in a bucket, behind one protocol; the sources see no other.

open_tree(root) -> Tree, and the file in it where the root is one -> folder.py, table.py, webdataset.py, metadata.py

On a disk nothing is opened through a link or outside the root (shared/beneath.py). In a bucket there are no links, and
a name cannot lead out of its prefix; what counts as a change of an object is its size and the time it was written.
"""

import errno
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from cache_builder.places import Place, Placed, open_place
from cache_builder.scan_cache import State, file_state
from cache_builder.sources.files import Entry, list_folder
from shared.beneath import explain, open_beneath, read_beneath, read_regular, relative_path
from shared.errors import DataError, StoreError

STREAM_BYTES = 4 << 20  # of an object that are asked for at once where it is read from its beginning
BUCKET_THREADS = 32  # objects that are read at once: a server takes its time to answer
_BUCKET = re.compile(r"s3://", re.IGNORECASE)

Root = Path | str  # a folder or a file; or an address in a bucket


class Tree(Protocol):
    """The files under a root; paths are relative to it, with "/"."""

    @property
    def is_remote(self) -> bool:
        """Whether each reading waits for a server, so that many are asked for at once."""
        ...

    def entries(self, folder: str) -> Sequence[Entry]:
        """What is in `folder`, "" for the root, sorted by the bytes of the names; raises OSError."""
        ...

    def state(self, entry: Entry) -> State:
        """What changes when the file does; raises OSError."""
        ...

    def open(self, path: str) -> BinaryIO:
        """A regular file, open to read; `path` is data. Raises OSError, DataError."""
        ...

    def read(self, path: str, max_bytes: int) -> bytes:
        """The bytes of a regular file, at most `max_bytes`; `path` is data. Raises DataError."""
        ...

    def read_entry(self, path: str, max_bytes: int) -> bytes:
        """The same of a file that `entries` gave. Raises DataError."""
        ...

    def read_span(self, path: str, start: int, length: int, max_bytes: int) -> bytes:
        """`length` bytes from `start` of a file, at most `max_bytes`; raises DataError."""
        ...


def is_bucket(root: Root) -> bool:
    """Whether a root is an address in a bucket."""
    return isinstance(root, str) and bool(_BUCKET.match(root))


def open_tree(root: Root) -> tuple[Tree, str | None]:
    """The tree under a root, and None; or the one that a file lies in, and its name. Raises OSError, ConfigError."""
    if isinstance(root, str) and is_bucket(root):
        return _open_bucket(root)
    folder = Path(root)
    if folder.is_dir():
        return FolderTree(folder), None
    target = folder.resolve(strict=True)  # the file itself may be a link: the user named it
    return FolderTree(target.parent), target.name


def name_of(root: Root) -> str:
    """The last part of a root's name."""
    return root.name if isinstance(root, Path) else root.rstrip("/").rpartition("/")[2]


def open_files(roots: Sequence[Root]) -> list[tuple[Tree, str]]:
    """The tree and the name in it of each of many files; raises OSError where one is none."""
    opened: dict[Root, BucketTree] = {}
    found: list[tuple[Tree, str]] = []
    for root in roots:
        if isinstance(root, str) and is_bucket(root):
            folder, _, name = root.rpartition("/")
            tree = opened.setdefault(folder, opened.get(folder) or BucketTree(open_place(folder)))
            if _as_os_error(root, partial(tree.place.kind, name)) != "file":
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), root)
            found.append((tree, name))
        else:
            target = Path(root).resolve(strict=True)
            found.append((FolderTree(target.parent), target.name))
    return found


def _open_bucket(address: str) -> tuple[Tree, str | None]:
    place = open_place(address)
    kind = _as_os_error(address, partial(place.kind, ""))
    if kind == "file":
        return open_files([address.rstrip("/")])[0]
    if kind is None:
        why = os.strerror(errno.ENOENT) if place.has_bucket else "there is no such bucket"
        raise FileNotFoundError(errno.ENOENT, why, address)
    return BucketTree(place), None


@dataclass(frozen=True)
class FolderTree:
    """A folder on a disk."""

    root: Path
    is_remote: bool = False

    def entries(self, folder: str) -> Sequence[Entry]:
        """As Tree says."""
        return list_folder(self.root / folder)

    def state(self, entry: Entry) -> State:
        """Size, mtime, ctime and inode."""
        return file_state(entry.path)

    def open(self, path: str) -> BinaryIO:
        """As Tree says."""
        return open_beneath(self.root, path)

    def read(self, path: str, max_bytes: int) -> bytes:
        """As Tree says."""
        return read_beneath(self.root, path, max_bytes)

    def read_entry(self, path: str, max_bytes: int) -> bytes:
        """As Tree says; the walk went through no link, so that the file alone needs to be none."""
        return read_regular(os.path.join(self.root, path), max_bytes)

    def read_span(self, path: str, start: int, length: int, max_bytes: int) -> bytes:
        """As Tree says."""
        _check_span(length, max_bytes)
        try:
            with self.open(path) as file:
                file.seek(start)
                data = file.read(length)
        except OSError as error:
            raise DataError(explain(error)) from None
        return _whole(data, length)


@dataclass(frozen=True)
class BucketTree:
    """What lies under a prefix in a bucket."""

    place: Place
    is_remote: bool = True

    def entries(self, folder: str) -> Sequence[Entry]:
        """As Tree says."""
        found = _as_os_error(self.place.label(folder), partial(self.place.entries, folder))
        return sorted(found, key=lambda entry: os.fsencode(entry.name))

    def state(self, entry: Entry) -> State:
        """Size and time of writing, as the listing gave them."""
        assert isinstance(entry, Placed)
        return entry.size, entry.mtime_ns, 0, 0

    def open(self, path: str) -> BinaryIO:
        """As Tree says."""
        return io.BufferedReader(_Raw(self._open(path)), STREAM_BYTES)

    def read(self, path: str, max_bytes: int) -> bytes:
        """As Tree says."""
        with self._reading(path) as file:
            size = file.size()
            if size > max_bytes:
                raise DataError(f"{size} bytes, more than {max_bytes}")
            return bytes(file.read_at(size, 0))

    read_entry = read

    def read_span(self, path: str, start: int, length: int, max_bytes: int) -> bytes:
        """As Tree says."""
        _check_span(length, max_bytes)
        with self._reading(path) as file:
            return _whole(file.read_at(length, start), length)

    @contextmanager
    def _reading(self, path: str) -> Iterator[Any]:
        try:
            with self._open(path) as file:
                yield file
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or str(error).splitlines()[0]}") from None

    def _open(self, path: str) -> Any:
        return _as_os_error(path, partial(self.place.open, relative_path(path)))


class _Raw(io.RawIOBase):
    """Arrow's file as Python's."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return int(self._file.readinto(buffer))

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _as_os_error(label: str, call: Callable[[], Any]) -> Any:
    """What a place says, as a disk says it: the sources count what cannot be read with its reason."""
    try:
        return call()
    except StoreError as error:
        raise OSError(errno.EIO, str(error), label) from None


def _check_span(length: int, max_bytes: int) -> None:
    if length > max_bytes:
        raise DataError(f"{length} bytes, more than {max_bytes}")


def _whole(data: bytes, length: int) -> bytes:
    if len(data) != length:
        raise DataError("cut short")
    return data
