"""How sources look at the disk: what lies in a folder, which files are shards, spans of them (shared/beneath.py opens).

a folder -> list_folder, find_shards -> names, in order; a span of a shard -> read_span -> bytes
"""

import operator
import os
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from shared.beneath import explain, open_beneath
from shared.errors import DataError


def read_span(root: Path, relative: str, start: int, length: int, max_bytes: int) -> bytes:
    """`length` bytes from `start` of a file under `root`, at most `max_bytes`; raises DataError."""
    if length > max_bytes:
        raise DataError(f"{length} bytes, more than {max_bytes}")
    try:
        with open_beneath(root, relative) as file:
            file.seek(start)
            data = file.read(length)
    except OSError as error:
        raise DataError(explain(error)) from None
    if len(data) != length:
        raise DataError("cut short")
    return data


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
