"""How sources look at folders: what lies in one, which files are shards (trees.py lists and opens).

a folder -> list_folder, find_shards -> names, in order
"""

import operator
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Protocol


class Entry(Protocol):
    """Something in a folder, as os.scandir gives it."""

    @property
    def name(self) -> str:
        """Without its folder."""
        ...

    @property
    def path(self) -> str:
        """With it."""
        ...

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is a regular file."""
        ...

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is a folder."""
        ...

    def is_symlink(self) -> bool:
        """Whether it is a link."""
        ...


class Folders(Protocol):
    """What lists folders (trees.py)."""

    def entries(self, folder: str) -> Sequence[Entry]:
        """What is in `folder`, "" for the root, sorted; raises OSError."""
        ...


def list_folder(folder: Path) -> list[os.DirEntry[str]]:
    """What is in `folder`, sorted by the bytes of the names; raises OSError."""
    with os.scandir(folder) as entries:
        found = list(entries)
    if all(
        entry.name.isascii() for entry in found
    ):  # whose order as text is the same, and found in a third of the time
        return sorted(found, key=operator.attrgetter("name"))
    return sorted(found, key=lambda entry: os.fsencode(entry.name))


def entry_kind(entry: Entry) -> str:
    """ "file", "folder", or the reason why it is neither."""
    try:
        if entry.is_file(follow_symlinks=False):
            return "file"
        if entry.is_symlink():
            return "symlink"
        return "folder" if entry.is_dir(follow_symlinks=False) else "not a regular file"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def tally_key(entry: Entry) -> str:
    """Under what a file that is not used is counted: its suffix."""
    if entry.name.startswith("."):
        return "(hidden)"
    if entry_kind(entry) == "symlink":
        return "(symlink)"
    return printable(os.path.splitext(entry.name)[1].lower()) or "(no suffix)"


def printable(name: str) -> str:
    """`name` with the bytes that are not UTF-8 written as \\xNN; any other name as it is."""
    return name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")


def find_shards(
    tree: Folders, suffixes: Collection[str], passed_over: Counter[str]
) -> Iterator[tuple[str, str | None]]:
    """(path under the root, None or why it is not read) of each file with one of `suffixes`, sorted by path.

    Hidden files and folders are passed over, links are not followed; other files are counted in `passed_over`.
    Raises OSError where the root cannot be listed.
    """
    todo = [("", entry) for entry in reversed(tree.entries(""))]
    while todo:
        prefix, entry = todo.pop()
        path, kind = prefix + entry.name, entry_kind(entry)
        if kind == "folder" and not entry.name.startswith("."):
            try:
                todo += [(path + "/", below) for below in reversed(tree.entries(path))]
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
