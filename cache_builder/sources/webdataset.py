"""WebDataset shards as a data set: key.jpg with key.txt, key.caption or key.json in tar files, never unpacked.

root, or a pattern with braces -> shards -> members -> groups of one key -> Found(SHARD/NAME) | Skipped -> build.py

Files of one key stand together in a shard. Pictures are read again by their place in it.
"""

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from cache_builder.captions import MAX_CAPTION_BYTES, CaptionRules, parse_caption
from cache_builder.sources import Found, MetaValue, Skipped
from cache_builder.sources.archive import Member, Refused, members
from cache_builder.sources.columns import Columns, Complaints, first_with_words, name_caption
from cache_builder.sources.files import find_shards, printable
from cache_builder.sources.rules import SourceRules
from cache_builder.sources.trees import Root, Tree, is_bucket, name_of, open_files, open_tree
from shared.beneath import relative_path
from shared.errors import ConfigError, DataError
from shared.pictures import EXTENSIONS

MAX_JSON_BYTES = 1 << 20
MAX_GROUP = 1000  # files of one key
MAX_SHARDS = 100_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class WebDatasetSource:
    """The pictures in tar shards: one .tar, a pattern such as shard-{000..012}.tar, or a folder of shards."""

    def __init__(
        self, root: Root, dataset_id: str, rules: SourceRules, caption_rules: CaptionRules, max_bytes: int
    ) -> None:
        self.root = root
        self.dataset_id = dataset_id
        self.passed_over: Counter[str] = Counter()
        self.containers = 0
        self._rules, self._caption_rules, self._max_bytes = rules, caption_rules, max_bytes
        self._columns = Columns(rules, caption_rules)

    def scan(self) -> Iterator[Found | Skipped]:
        """Every picture in the order of shards and members; raises DataError at once where a shard is missing."""
        self.passed_over.clear()
        self.containers = 0
        try:
            shards = self._shards()
        except OSError as error:
            raise DataError(f"data set {self.dataset_id}: shard {error.filename}: {error.strerror}") from None
        return itertools.chain.from_iterable(self._shard(*shard) for shard in shards)

    def _shards(self) -> Sequence[tuple[Tree, str, str, str | None]]:
        """Tree, path in it, label, and None or why it is not read, of each shard; one that was named may be a link."""
        try:
            tree, name = open_tree(self.root)
        except FileNotFoundError:
            names = expand_braces(str(self.root))
            files = open_files(names if is_bucket(self.root) else [Path(name) for name in names])
            labels = [os.path.basename(name) for name in names]
            return [(*file, label, None) for file, label in zip(files, labels, strict=True)]
        if name is not None:
            return [(tree, name, name_of(self.root), None)]
        return [(tree, path, path, why) for path, why in find_shards(tree, (".tar",), self.passed_over)]

    def _shard(self, folder: Tree, path: str, label: str, why: str | None) -> Iterator[Found | Skipped]:
        label = printable(label)
        self.containers += 1
        try:
            if why is not None:
                raise DataError(why)
            with folder.open(path) as file:
                shard = _Shard(folder, path, label, file, Complaints(label, "file"))
                for group in _groups(members(file)):
                    yield from self._group(shard, group)
        except OSError as error:
            yield Skipped(label, f"{label}: cannot be read: {error.strerror}")
        except DataError as error:
            yield Skipped(label, f"{label}: {error}")

    def _group(self, shard: "_Shard", group: Sequence[Member | Refused]) -> Iterator[Found | Skipped]:
        """The pictures among the files of one key."""
        by_suffix = {suffix: item for item in reversed(group) if (suffix := _suffix(item.name))}
        captions = [ext for ext in self._caption_rules.extensions if ext in by_suffix][:1]
        used = [*captions, ".json"] if any(_is_picture(item.name) for item in group) else []
        for item in group:
            if os.path.basename(item.name).startswith("."):
                self.passed_over["(hidden)"] += 1
            elif _is_picture(item.name):
                yield self._picture(shard, item, [(ext, by_suffix[ext]) for ext in used if ext in by_suffix])
            elif _suffix(item.name) not in used:
                self.passed_over[printable(os.path.splitext(item.name)[1].lower()) or "(no suffix)"] += 1

    def _picture(
        self, shard: "_Shard", item: Member | Refused, texts: Sequence[tuple[str, Member | Refused]]
    ) -> Found | Skipped:
        try:
            name = relative_path(item.name)
            if isinstance(item, Refused):
                raise DataError(item.reason)
            captions, meta = self._texts(shard, name, texts)
        except DataError as error:
            return shard.complaints.skip(printable(item.name)[:200], str(error))
        read = partial(shard.folder.read_span, shard.path, item.start, item.size, self._max_bytes)
        return Found(f"{shard.label}/{name}", captions, read, meta, is_slow=shard.folder.is_remote)

    def _texts(
        self, shard: "_Shard", name: str, texts: Sequence[tuple[str, Member | Refused]]
    ) -> tuple[tuple[str, ...], dict[str, MetaValue]]:
        """Captions and what travels along, from the files beside a picture; raises DataError."""
        captions: tuple[str, ...] = ()
        values: dict[str, Any] = {}
        for suffix, item in texts:
            try:
                if suffix == ".json":
                    values = _json_object(shard.text(item, MAX_JSON_BYTES))
                else:
                    captions = parse_caption(shard.text(item, MAX_CAPTION_BYTES), self._caption_rules) or ("",)
            except DataError as error:
                raise DataError(f"{'its .json' if suffix == '.json' else 'caption'}: {error}") from None
        if self._rules.captions_from == "name":
            captions = name_caption(name, self._caption_rules)
        return first_with_words(captions, self._columns.captions(values, name)), self._columns.meta(values)


@dataclass(frozen=True)
class _Shard:
    """One tar file that is being read."""

    folder: Tree
    path: str
    label: str
    file: BinaryIO
    complaints: Complaints

    def text(self, item: Member | Refused, max_bytes: int) -> bytes:
        """The bytes of a small member; raises DataError."""
        if isinstance(item, Refused):
            raise DataError(item.reason)
        if item.size > max_bytes:
            raise DataError(f"{item.size} bytes, more than {max_bytes}")
        self.file.seek(item.start)
        return self.file.read(item.size)


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern with {000..012} or {a,b} stands for, in order; raises ConfigError."""
    names = [pattern]
    while any(_BRACES.search(name) for name in names):
        names = [name[: m.start()] + choice + name[m.end() :] for name, m, choice in _choices(names)]
    return names


def _choices(names: Sequence[str]) -> Iterator[tuple[str, re.Match[str], str]]:
    count = 0
    for name in names:
        match = _BRACES.search(name)
        assert match  # all of them come from one pattern
        for choice in _alternatives(match[1]):
            count += 1
            if count > MAX_SHARDS:
                raise ConfigError(f"the pattern stands for more than {MAX_SHARDS} shards")
            yield name, match, choice


def _alternatives(inside: str) -> Iterable[str]:
    if bounds := _RANGE.fullmatch(inside):
        first, last = bounds.groups()
        return (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return inside.split(",")


def _groups(items: Iterator[Member | Refused]) -> Iterator[list[Member | Refused]]:
    """Consecutive files of one key; where the archive is damaged, first what came before."""
    group: list[Member | Refused] = []
    damage: DataError | None = None
    try:
        for item in items:
            if group and (_key(item.name) != _key(group[0].name) or len(group) >= MAX_GROUP):
                yield group
                group = []
            group.append(item)
    except DataError as error:
        damage = error
    if group:
        yield group
    if damage:
        raise damage


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _key(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    return folder, base.partition(".")[0]


def _suffix(name: str) -> str:
    """What follows the key: ".jpg" of "a/key.jpg", ".left.jpg" of "a/key.left.jpg"."""
    _, dot, suffix = name.rpartition("/")[2].partition(".")
    return (dot + suffix).lower()


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {str(error)[:80]}") from None
    if not isinstance(values, dict):
        raise DataError("not a JSON object")
    return values
