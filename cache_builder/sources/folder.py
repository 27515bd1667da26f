"""A folder of pictures with captions in sidecar files, metadata.csv and the like, or their names; in order of names.

root -> sorted walk -> Found(path, captions, read) | Skipped(path, reason) -> build.py
   metadata.py: rows that name pictures of the folder or below it

Names are data: the root is not left, symbolic links are not followed, and only regular files are opened.
"""

import errno
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from cache_builder.captions import MAX_CAPTION_BYTES, CaptionRules, parse_caption
from cache_builder.scan_cache import ScanCache, read_remembered
from cache_builder.sources import NO_META, Found, Skipped
from cache_builder.sources.columns import Complaints, name_caption
from cache_builder.sources.files import Entry as FileEntry
from cache_builder.sources.files import entry_kind, printable, tally_key
from cache_builder.sources.metadata import Entry, read_metadata
from cache_builder.sources.rules import SourceRules
from cache_builder.sources.trees import BUCKET_THREADS, Root, open_tree
from shared.errors import DataError
from shared.pictures import EXTENSIONS

FETCHED_AT_ONCE = 256  # entries whose captions are asked for together, in a bucket


class FolderSource:
    """The pictures under `root`, read recursively; hidden files and folders are passed over."""

    def __init__(
        self,
        root: Root,
        dataset_id: str,
        caption_rules: CaptionRules,
        max_bytes: int,
        rules: SourceRules = SourceRules(),  # noqa: B008 -- frozen
    ) -> None:
        self.root = root
        self.dataset_id = dataset_id
        self.passed_over: Counter[str] = Counter()
        self.containers = 0
        self._caption_rules = caption_rules
        self._max_bytes = max_bytes
        self._rules = rules
        self._entries: dict[str, list[Entry]] = {}
        self._fetched: dict[str, bytes | DataError] = {}
        self.cache = ScanCache()

    def scan(self) -> Iterator[Found | Skipped]:
        """Everything under the root that is a picture by its name, sorted by path; raises DataError at once."""
        try:
            self._tree, name = open_tree(self.root)
            if name is not None:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            entries = self._tree.entries("")
        except OSError as error:
            raise DataError(f"data set {self.dataset_id}: folder {self.root}: {error.strerror}") from None
        self.passed_over.clear()
        self._entries.clear()
        self._fetched.clear()
        return self._walk(entries)

    def read(self, path: str) -> bytes:
        """The bytes of the picture at `path` under the root; raises DataError."""
        return self._tree.read_entry(path, self._max_bytes)

    def _walk(self, entries: Sequence[FileEntry]) -> Iterator[Found | Skipped]:
        levels = [self._items(entries, "")]  # a stack of our own: a tree may be deeper than Python's
        while levels:
            item = next(levels[-1], None)
            if item is None:
                levels.pop()
            elif isinstance(item, str):
                try:
                    levels.append(self._items(self._tree.entries(item), item + "/"))
                except OSError as error:
                    yield Skipped(printable(item) + "/", f"folder cannot be read: {error.strerror}")
            else:
                yield item
        yield from self._missing()

    def _items(self, entries: Sequence[FileEntry], prefix: str) -> Iterator[Found | Skipped | str]:
        """One folder's pictures and, as plain strings, its sub-folders."""
        by_name = {entry.name: entry for entry in entries}
        sidecars = {name: self._sidecar(name, by_name) for name in by_name if _is_picture(name)}
        metadata = next((name for name in self._rules.metadata if name in by_name), None)
        if metadata is not None:
            yield from self._load(by_name[metadata], prefix + metadata)
        in_use = {*(entry.name for entry in sidecars.values() if entry), metadata}
        for name, entry in self._with_captions(by_name, sidecars, prefix):
            if name.startswith("."):
                self.passed_over["(hidden)"] += 1
            elif entry_kind(entry) == "folder":
                yield prefix + name
            elif name in sidecars:
                for row in self._entries.pop(prefix + name, [None]):
                    yield self._picture(entry, prefix + name, sidecars[name], row)
            elif name not in in_use:
                self.passed_over[tally_key(entry)] += 1

    def _sidecar(self, name: str, by_name: dict[str, FileEntry]) -> FileEntry | None:
        stem = name.rpartition(".")[0]
        for extension in self._caption_rules.extensions:
            if (entry := by_name.get(stem + extension)) is not None:
                return entry
        return None

    def _with_captions(
        self, by_name: Mapping[str, FileEntry], sidecars: Mapping[str, FileEntry | None], prefix: str
    ) -> Iterator[tuple[str, FileEntry]]:
        """The same, a few at once, after reading what belongs to these where each reading waits for a server."""
        rest = iter(by_name.items())
        with ThreadPoolExecutor(BUCKET_THREADS) as pool:  # which starts none before there is work
            while some := list(itertools.islice(rest, FETCHED_AT_ONCE)):
                if self._tree.is_remote:
                    wanted = [entry for name, _ in some if (entry := sidecars.get(name)) is not None]
                    paths = [prefix + entry.name for entry in wanted if not self._knows(prefix + entry.name, entry)]
                    self._fetched |= zip(paths, pool.map(self._fetch, paths), strict=True)
                yield from some

    def _knows(self, path: str, sidecar: FileEntry) -> bool:
        name = path if "/" in path else "/" + path  # as _captions calls it
        return self.cache.has("caption", name, self._tree.state(sidecar))

    def _fetch(self, path: str) -> bytes | DataError:
        try:
            return self._tree.read_entry(path, MAX_CAPTION_BYTES)
        except DataError as error:
            return error

    def _read_caption(self, path: str) -> bytes:
        path = path.removeprefix("/")
        fetched = self._fetched.pop(path, None)
        if isinstance(fetched, DataError):
            raise fetched
        return self._tree.read_entry(path, MAX_CAPTION_BYTES) if fetched is None else fetched

    def _load(self, entry: FileEntry, path: str) -> Iterator[Skipped]:
        """Keep what a metadata file says of pictures that are met later."""
        if (kind := entry_kind(entry)) != "file" or path != printable(path):
            yield Skipped(printable(path), f"{entry.name}: {kind if kind != 'file' else 'its folder is not UTF-8'}")
            return
        for item in read_metadata(self._tree, path, self._rules, self._caption_rules):
            if isinstance(item, Skipped):
                yield item
            else:
                self._entries.setdefault(item[0], []).append(item[1])

    def _missing(self) -> Iterator[Skipped]:
        """Rows that named no picture."""
        complaints: dict[str, Complaints] = {}
        for picture, rows in self._entries.items():
            for row in rows:
                file = complaints.setdefault(row.file, Complaints(row.file, row.unit))
                yield file.skip(row.number, f"there is no picture {picture}")

    def _picture(self, entry: FileEntry, path: str, sidecar: FileEntry | None, row: Entry | None) -> Found | Skipped:
        if path != printable(path):
            return Skipped(printable(path), "name is not UTF-8")
        if (kind := entry_kind(entry)) != "file":
            return Skipped(path, kind)
        try:
            captions = self._captions(path, sidecar, row)
        except DataError as error:
            return Skipped(path, str(error))
        meta = row.meta if row else NO_META
        look = partial(self._tree.state, entry)
        read = partial(self._tree.read_entry, path, self._max_bytes)
        return Found(path, captions, read, meta, look, self._tree.is_remote)

    def _captions(self, path: str, sidecar: FileEntry | None, row: Entry | None) -> tuple[str, ...]:
        said = row.captions if row else ()
        if any(said):
            return said
        if self._rules.captions_from == "name":
            return name_caption(path, self._caption_rules)
        if sidecar is None:
            return said
        try:
            if (kind := entry_kind(sidecar)) != "file":
                raise DataError(kind)
            below = path.rpartition("/")[0] + "/" + sidecar.name
            look, read = partial(self._tree.state, sidecar), partial(self._read_caption, below)
            data = read_remembered(self.cache, "caption", below, look, read)
            return parse_caption(data, self._caption_rules) or ("",)
        except DataError as error:
            raise DataError(f"caption: {error}") from None


def _is_picture(name: str) -> bool:
    _, dot, suffix = name.rpartition(".")
    return not name.startswith(".") and (dot + suffix).lower() in EXTENSIONS
