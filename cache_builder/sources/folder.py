"""A folder of pictures with captions in sidecar files: cat.png and cat.txt; scanned in the order of names.

root -> sorted walk -> Found(path, captions, read) | Skipped(path, reason) -> build.py

Names are data: the root is not left, symbolic links are not followed, and only regular files are opened.
"""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from cache_builder.captions import MAX_CAPTION_BYTES, CaptionRules, parse_caption
from cache_builder.pixels import EXTENSIONS
from cache_builder.sources import Found, Skipped
from shared.errors import DataError

_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # non-blocking: a FIFO must not hang a build


class FolderSource:
    """The pictures under `root`, read recursively; hidden files and folders are passed over."""

    def __init__(self, root: Path, dataset_id: str, caption_rules: CaptionRules, max_bytes: int) -> None:
        self.root = root
        self.dataset_id = dataset_id
        self.passed_over: Counter[str] = Counter()
        self._caption_rules = caption_rules
        self._max_bytes = max_bytes

    def scan(self) -> Iterator[Found | Skipped]:
        """Everything under the root that is a picture by its name, sorted by path; raises DataError at once."""
        try:
            entries = _list(self.root)
        except OSError as error:
            raise DataError(f"data set {self.dataset_id}: folder {self.root}: {error.strerror}") from None
        self.passed_over.clear()
        return self._walk(entries)

    def _walk(self, entries: list[os.DirEntry[str]]) -> Iterator[Found | Skipped]:
        levels = [self._items(entries, "")]  # a stack of our own: a tree may be deeper than Python's
        while levels:
            item = next(levels[-1], None)
            if item is None:
                levels.pop()
            elif isinstance(item, str):
                try:
                    levels.append(self._items(_list(self.root / item), item + "/"))
                except OSError as error:
                    yield Skipped(_printable(item) + "/", f"folder cannot be read: {error.strerror}")
            else:
                yield item

    def _items(self, entries: list[os.DirEntry[str]], prefix: str) -> Iterator[Found | Skipped | str]:
        """One folder's pictures and, as plain strings, its sub-folders."""
        by_name = {entry.name: entry for entry in entries}
        sidecars = {e.name: s for e in entries if _is_picture(e.name) and (s := self._sidecar_name(e.name, by_name))}
        captions_in_use = set(sidecars.values())
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                self.passed_over["(hidden)"] += 1
            elif _kind(entry) == "folder":
                yield prefix + name
            elif _is_picture(name):
                yield self._picture(entry, prefix + name, by_name.get(sidecars.get(name, "")))
            elif name not in captions_in_use:
                self.passed_over[_tally_key(entry)] += 1

    def _sidecar_name(self, name: str, by_name: dict[str, os.DirEntry[str]]) -> str | None:
        stem = os.path.splitext(name)[0]
        return next((stem + ext for ext in self._caption_rules.extensions if stem + ext in by_name), None)

    def _picture(self, entry: os.DirEntry[str], path: str, sidecar: os.DirEntry[str] | None) -> Found | Skipped:
        if path != _printable(path):
            return Skipped(_printable(path), "name is not UTF-8")
        if (kind := _kind(entry)) != "file":
            return Skipped(path, kind)
        try:
            captions = self._captions(sidecar) if sidecar else ()
        except DataError as error:
            return Skipped(path, f"caption: {error}")
        return Found(path, captions, partial(read_regular, entry.path, self._max_bytes))

    def _captions(self, sidecar: os.DirEntry[str]) -> tuple[str, ...]:
        if (kind := _kind(sidecar)) != "file":
            raise DataError(kind)
        return parse_caption(read_regular(sidecar.path, MAX_CAPTION_BYTES), self._caption_rules) or ("",)


def read_regular(path: str, max_bytes: int) -> bytes:
    """The bytes of a regular file, at most `max_bytes`, never through a symbolic link at its end; raises DataError."""
    try:
        with open(os.open(path, _OPEN_FLAGS), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DataError("not a regular file")
            if status.st_size > max_bytes:
                raise DataError(f"{status.st_size} bytes, more than {max_bytes}")
            data = file.read(status.st_size + 1)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from None
    if len(data) != status.st_size:
        raise DataError("changed while it was read")
    return data


def _list(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: os.fsencode(entry.name))


def _kind(entry: os.DirEntry[str]) -> str:
    """ "file", "folder", or the reason why it is neither."""
    try:
        if entry.is_symlink():
            return "symlink"
        if entry.is_dir(follow_symlinks=False):
            return "folder"
        return "file" if entry.is_file(follow_symlinks=False) else "not a regular file"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _is_picture(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def _tally_key(entry: os.DirEntry[str]) -> str:
    if _kind(entry) == "symlink":
        return "(symlink)"
    return _printable(os.path.splitext(entry.name)[1].lower()) or "(no suffix)"


def _printable(name: str) -> str:
    """`name` with the bytes that are not UTF-8 written as \\xNN; any other name as it is."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
