"""Files below a root: only regular ones, never through a link, never outside; for names that came from anywhere.

a name -> relative_path (or DataError) -> read_beneath -> bytes

Names are data: they may be hostile, they may not be UTF-8, and they are never opened as they stand.
"""

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
        return _read(open_regular(path), max_bytes)
    except OSError as error:
        raise DataError(explain(error)) from None


def read_beneath(root: Path, relative: str, max_bytes: int) -> bytes:
    """The bytes of a regular file under `root`, through no link below it; raises DataError."""
    try:
        return _read(open_beneath(root, relative), max_bytes)
    except OSError as error:
        raise DataError(explain(error)) from None


def open_beneath(root: Path, relative: str) -> BinaryIO:
    """A regular file under `root`, open to read, through no link below it; raises OSError, DataError."""
    *folders, name = relative_path(relative).split("/")
    descriptor = os.open(root, _FOLDER_FLAGS)  # the root itself may be a link: the user named it
    try:
        for folder in folders:
            below = os.open(folder, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        return open_regular(name, descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: str, dir_fd: int | None = None) -> BinaryIO:
    """A regular file, open to read; raises OSError, DataError where it is something else."""
    file = open(os.open(path, _OPEN_FLAGS, dir_fd=dir_fd), "rb")  # noqa: SIM115 -- the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DataError("not a regular file")
    return file


def _read(file: BinaryIO, max_bytes: int) -> bytes:
    with file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise DataError(f"{size} bytes, more than {max_bytes}")
        data = file.read(size + 1)
    if len(data) != size:
        raise DataError("changed while it was read")
    return data


def explain(error: OSError) -> str:
    """Why a file cannot be read, as a report says it."""
    return f"cannot be read: {error.strerror}"
