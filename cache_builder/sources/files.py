"""How sources touch the disk: only regular files, never through a link, never outside a data set's root.

a name from anywhere -> relative_path (or DataError) -> read_beneath -> bytes; a folder -> list_folder, find_shards

Names are data: they may be hostile, they may not be UTF-8, and they are never opened as they stand.
"""

import operator
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator
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
        raise DataError(_explain(error)) from None


def read_beneath(root: Path, relative: str, max_bytes: int) -> bytes:
    """The bytes of a regular file under `root`, through no link below it; raises DataError."""
    try:
        return _read(open_beneath(root, relative), max_bytes)
    except OSError as error:
        raise DataError(_explain(error)) from None


def read_span(root: Path, relative: str, start: int, length: int, max_bytes: int) -> bytes:
    """`length` bytes from `start` of a file under `root`, at most `max_bytes`; raises DataError."""
    if length > max_bytes:
        raise DataError(f"{length} bytes, more than {max_bytes}")
    try:
        with open_beneath(root, relative) as file:
            file.seek(start)
            data = file.read(length)
    except OSError as error:
        raise DataError(_explain(error)) from None
    if len(data) != length:
        raise DataError("cut short")
    return data


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


def _explain(error: OSError) -> str:
    return f"cannot be read: {error.strerror}"


def list_folder(folder: Path) -> list[os.DirEntry[str]]:
    """What is in `folder`, sorted by the bytes of the names; raises OSError."""
    with os.scandir(folder) as entries:
        found = list(entries)
    if all(
        entry.name.isascii() for entry in found
    ):  # whose order as text is the same, and found in a third of the time
        return sorted(found, key=operator.attrgetter("name"))
    return sorted(found, key=lambda entry: os.fsencode(entry.name))


def entry_kind(entry: os.DirEntry[str]) -> str:
    """ "file", "folder", or the reason why it is neither."""
    try:
        if entry.is_file(follow_symlinks=False):
            return "file"
        if entry.is_symlink():
            return "symlink"
        return "folder" if entry.is_dir(follow_symlinks=False) else "not a regular file"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def tally_key(entry: os.DirEntry[str]) -> str:
    """Under what a file that is not used is counted: its suffix."""
    if entry.name.startswith("."):
        return "(hidden)"
    if entry_kind(entry) == "symlink":
        return "(symlink)"
    return printable(os.path.splitext(entry.name)[1].lower()) or "(no suffix)"


def printable(name: str) -> str:
    """`name` with the bytes that are not UTF-8 written as \\xNN; any other name as it is."""
    return name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")


def find_shards(root: Path, suffixes: Collection[str], passed_over: Counter[str]) -> Iterator[tuple[str, str | None]]:
    """(path under `root`, None or why it is not read) of each file with one of `suffixes`, sorted by path.

    Hidden files and folders are passed over, links are not followed; other files are counted in `passed_over`.
    Raises OSError where `root` cannot be listed.
    """
    todo = [("", entry) for entry in reversed(list_folder(root))]
    while todo:
        prefix, entry = todo.pop()
        path, kind = prefix + entry.name, entry_kind(entry)
        if kind == "folder" and not entry.name.startswith("."):
            try:
                todo += [(path + "/", below) for below in reversed(list_folder(root / path))]
            except OSError as error:
                yield path + "/", f"folder cannot be read: {error.strerror}"
        elif os.path.splitext(entry.name)[1].lower() in suffixes and not entry.name.startswith("."):
            yield path, _unusable(path, kind)
        else:
            passed_over[tally_key(entry)] += 1


def _unusable(path: str, kind: str) -> str | None:
    if path != printable(path):
        return "name is not UTF-8"
    return None if kind == "file" else kind
