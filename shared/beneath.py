"""Files below a root: only regular ones, never through a link, never outside; for names that came from anywhere.

a name -> relative_path (or DataError) -> read_beneath -> bytes

Names are data: they may be hostile, they may not be UTF-8, and they are never opened as they stand.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from shared.errors import DataError

MAX_PATH_BYTES = 4096
_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # non-blocking: a FIFO must not hang a build
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def relative_path(name: str) -> str:
    """`name`, as a table or an archive gives it, relative to the root with "/"; raises DataError where it leaves it."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        raise DataError("its name is not UTF-8") from None
    if "\0" in name:
        raise DataError("its name holds a NUL byte")
    if len(encoded) > MAX_PATH_BYTES:
        raise DataError(f"its name has {len(encoded)} bytes, more than {MAX_PATH_BYTES}")
    if name.startswith(("/", "\\")) or name[1:3] in (":/", ":\\"):
        raise DataError(f"{name[:200]} is an absolute path; write paths relative to the data set's folder")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise DataError(f"{name[:200]} leaves the data set's folder")
    if not parts:
        raise DataError("its name is empty")
    return "/".join(parts)


def read_regular(path: str, max_bytes: int) -> bytes:
    """The bytes of a regular file, at most `max_bytes`, never through a symbolic link at its end; raises DataError."""
    try:
        return _read(open_unfollowed(path), max_bytes)
    except OSError as error:
        raise DataError(explain(error)) from None


def read_beneath(root: Path, relative: str, max_bytes: int) -> bytes:
    """The bytes of a regular file under `root`, through no link below it; raises DataError."""
    try:
        return _read(_open_beneath(root, relative), max_bytes)
    except OSError as error:
        raise DataError(explain(error)) from None


def open_beneath(root: Path, relative: str) -> BinaryIO:
    """A regular file under `root`, open to read, through no link below it; raises OSError, DataError."""
    file = open(_open_beneath(root, relative), "rb")  # noqa: SIM115 -- the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DataError("not a regular file")
    return file


def open_unfollowed(path: str, dir_fd: int | None = None) -> int:
    """A descriptor of what lies at `path`, whatever it is, but for a symbolic link; raises OSError."""
    return os.open(path, _OPEN_FLAGS, dir_fd=dir_fd)


def _open_beneath(root: Path, relative: str) -> int:
    *folders, name = relative_path(relative).split("/")
    descriptor = os.open(root, _FOLDER_FLAGS)  # the root itself may be a link: the user named it
    try:
        for folder in folders:
            below = os.open(folder, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        return open_unfollowed(name, descriptor)
    finally:
        os.close(descriptor)


def _read(descriptor: int, max_bytes: int) -> bytes:
    """All of a file, which is closed; without Python's buffers, which cost more than a small file's bytes."""
    try:
        size = _size(descriptor)
        if size > max_bytes:
            raise DataError(f"{size} bytes, more than {max_bytes}")
        data = os.read(descriptor, size + 1)
        while len(data) < size and (more := os.read(descriptor, size + 1 - len(data))):
            data += more  # beyond 2 GiB, or from a disk that gives less at once
    finally:
        os.close(descriptor)
    if len(data) != size:
        raise DataError("changed while it was read")
    return data


def _size(descriptor: int) -> int:
    seen = os.fstat(descriptor)
    if stat.S_ISDIR(seen.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(seen.st_mode):
        raise DataError("not a regular file")
    return seen.st_size


def explain(error: OSError) -> str:
    """Why a file cannot be read, as a report says it."""
    return f"cannot be read: {error.strerror}"
