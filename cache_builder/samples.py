"""All that a build knows of its samples, in columns of unnamed files: three million of them are no matter of memory.

scan.py adds pictures and settles what they are -> Samples -> todo.py, fill.py, split.py, sealing.py

    rows      one for each sample: digest, size, where its crops and texts begin, where its words lie
    crops     key of the latents and plan of each crop; those of a sample stand together, in the order of samples
    texts     key of the embeds of each caption, and where it lies in `words`; likewise. Prompts follow at the end
    facts     whether the picture has been decoded, now or earlier, and its thumbnail
    words     captions, and by msgpack: path, what its source reads it by, what travels along

Whoever wants one sample takes samples[index], which is made when it is asked for; whoever wants something of all of
them takes a column, which is an array.
"""

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, overload

import msgpack
import numpy as np

from cache_builder.buckets import CropPlan
from cache_builder.key_arrays import KEY_DTYPE, Indices
from cache_builder.keys import KeyOf
from cache_builder.sources import Found, MetaValue
from cache_builder.split import THUMBNAIL_HWC, Thumbnail
from shared.pictures import PixelLimits, PixelRules
from shared.record import KEY_BYTES
from shared.scratch import Column

ROWS_AT_ONCE = 4096
MOST_PLANS = 4096  # that are kept as they are; random crops have plans of their own

_ROW = struct.Struct("<32s16sIIIIQIQIQI??")
_ROW_DTYPE = np.dtype(
    [("digest", "<u8", 4), ("facts_key", KEY_DTYPE), ("original_hw", "<u4", 2), ("source", "<u4"), ("reader", "<u4")]
    + [(name + part, kind) for name in ("crop", "text", "word") for part, kind in (("s", "<u8"), ("_count", "<u4"))]
    + [("is_sided", "?"), ("has_meta", "?")]
)  # fmt: skip
_CROP = struct.Struct("<16s6I?")
_CROP_DTYPE = np.dtype(
    [("key", KEY_DTYPE), ("resize_hw", "<u4", 2), ("corner", "<u4", 2), ("target_hw", "<u4", 2), ("flip", "?")]
)
_TEXT = struct.Struct("<16sQI")
_TEXT_DTYPE = np.dtype([("key", KEY_DTYPE), ("at", "<u8"), ("length", "<u4")])
_FACTS_DTYPE = np.dtype([("is_known", "?"), ("thumbnail", "u1", THUMBNAIL_HWC)])
_NO_FACTS = bytes(_FACTS_DTYPE.itemsize)


@dataclass(frozen=True, slots=True)
class PlannedCrop:
    """One crop of a picture and the key of its latents."""

    plan: CropPlan
    latent_key: bytes


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture of one data set with all that its row in the manifest needs."""

    index: int
    dataset: str
    path: str
    digest: bytes
    read: Callable[[], bytes]
    captions: tuple[str, ...]
    text_keys: tuple[bytes, ...]
    original_hw: tuple[int, int]
    crops: tuple[PlannedCrop, ...]
    facts_key: bytes
    rules: PixelRules
    limits: PixelLimits
    meta: Mapping[str, MetaValue]
    thumbnail: Thumbnail | None
    """None until the picture has been decoded, in this build or an earlier one."""


@dataclass(frozen=True, slots=True)
class DataSet:
    """What the samples of one data set have in common."""

    id: str
    rules: PixelRules
    limits: PixelLimits


class _Row(NamedTuple):
    """A row as Python has it."""

    digest: bytes
    facts_key: bytes
    height: int
    width: int
    source: int
    reader: int
    crops: int
    crop_count: int
    texts: int
    text_count: int
    words: int
    word_count: int
    is_sided: bool
    has_meta: bool


class Samples(Sequence[Sample]):
    """The samples of a build, in the order of their sources."""

    def __init__(self, text_key: KeyOf, folder: Path | None = None) -> None:
        """Their columns lie in `folder`; `text_key` makes the key of a caption's UTF-8."""
        self._text_key, self._folder = text_key, folder
        self._rows, self._facts = Column(_ROW_DTYPE, folder), Column(_FACTS_DTYPE, folder)
        self._crops, self._texts = Column(_CROP_DTYPE, folder), Column(_TEXT_DTYPE, folder)
        self._words = Column("u1", folder)
        self.datasets: list[DataSet] = []
        self._readers: dict[Any, int] = {}
        self._reader_of: list[Callable[..., bytes]] = []
        self._plans: dict[tuple[int, ...], CropPlan] = {}

    def add(
        self,
        found: Found,
        digest: bytes,
        facts_key: bytes,
        size_hw: tuple[int, int],
        thumbnail: Thumbnail | None,
        captions: Sequence[str],
        crops: Sequence[bytes],
        *,
        is_sided: bool,
    ) -> None:
        """Add a picture of the last of `datasets` with its packed crops."""
        texts, text_count = self._add_texts(captions)
        at, size = self._add_words(found.path, found.read.args, found.meta)
        if (reader := self._readers.get(found.read.func)) is None:
            reader = self._readers[found.read.func] = len(self._reader_of)
            self._reader_of.append(found.read.func)
        numbers = len(self.datasets) - 1, reader, len(self._crops), len(crops), texts, text_count, at, size
        self._rows.append(_ROW.pack(digest, facts_key, *size_hw, *numbers, is_sided, bool(found.meta)))
        self._crops.append(b"".join(crops))
        self._facts.append(_NO_FACTS if thumbnail is None else b"\1" + thumbnail)

    def add_text(self, text: str) -> int:
        """Add a text that is no sample's caption; which of the texts it is. Once the samples are settled."""
        return self._add_texts([text])[0]

    def merge(self, one: int, others: Sequence[int]) -> None:
        """Give sample `one` the captions and meta of `others` too, which have the same picture."""
        rows = [self._row(index) for index in (one, *others)]
        captions = dict.fromkeys(caption for row in rows for caption in self._captions(row))
        texts, count = self._add_texts([*captions])
        path, place, meta = self._said(rows[0])
        for row in rows[1:]:
            meta = {**self._said(row)[2], **meta}
        at, size = self._add_words(path, place, meta)
        merged = rows[0]._replace(texts=texts, text_count=count, words=at, word_count=size, has_meta=bool(meta))
        self._rows.put(one, _ROW.pack(*merged._replace(is_sided=any(row.is_sided for row in rows))))

    def keep_crops(self, index: int, count: int) -> None:
        """Leave sample `index` its first `count` crops."""
        self._rows.put(index, _ROW.pack(*self._row(index)._replace(crop_count=count)))

    def only(self, kept: Indices) -> "Samples":
        """Those at `kept`, ascending, with nothing between their crops and texts."""
        left = Samples(self._text_key, self._folder)
        left._words, left.datasets = self._words, self.datasets
        left._readers, left._reader_of = self._readers, self._reader_of
        for start in range(0, len(kept), ROWS_AT_ONCE):
            some = kept[start : start + ROWS_AT_ONCE]
            rows = self._rows.array[some].copy()
            left._facts.append(self._facts.array[some].tobytes())
            for name, column, new in (("crop", self._crops, left._crops), ("text", self._texts, left._texts)):
                starts, counts = rows[name + "s"].astype(np.int64), rows[name + "_count"].astype(np.int64)
                ends = np.cumsum(counts)
                rows[name + "s"] = len(new) + ends - counts
                new.append(column.array[np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1])].tobytes())
            left._rows.append(rows.tobytes())
        return left

    def learn(self, index: int, thumbnail: Thumbnail) -> None:
        """Note what decoding found out of a picture."""
        self._facts.put(index, b"\1" + thumbnail)

    @property
    def rows(self) -> np.ndarray[Any, Any]:
        """digest, facts_key, original_hw, source, crop_count, text_count, is_sided, has_meta, ... of each sample."""
        return self._rows.array

    @property
    def crops(self) -> np.ndarray[Any, Any]:
        """key, target_hw, ... of each crop."""
        return self._crops.array

    @property
    def texts(self) -> np.ndarray[Any, Any]:
        """key, ... of each caption of each sample, and then of each further text."""
        return self._texts.array

    @property
    def facts(self) -> np.ndarray[Any, Any]:
        """is_known and thumbnail, uint8 [8, 9, 3], of each sample's picture."""
        return self._facts.array

    def of_crop(self, crops: Indices) -> Indices:
        """Which samples these `crops` are of."""
        return np.searchsorted(self.rows["crops"], crops, side="right") - 1

    def text(self, index: int) -> str:
        """One of the texts."""
        _, at, length = _TEXT.unpack_from(self._texts.view, index * _TEXT.size)
        return str(self._words.view[at : at + length], "utf-8")

    def path(self, index: int) -> str:
        """Where the picture of a sample is, as its source says."""
        return str(self._said(self._row(index))[0])

    def crop(self, index: int) -> PlannedCrop:
        """One of the crops."""
        key, *numbers = _CROP.unpack_from(self._crops.view, index * _CROP.size)
        return PlannedCrop(self._plan(tuple(numbers)), key)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        index = range(len(self))[index]
        row, facts = self._row(index), self._facts.view[index * len(_NO_FACTS) : (index + 1) * len(_NO_FACTS)]
        path, place, meta = self._said(row)
        dataset = self.datasets[row.source]
        return Sample(
            index=index,
            dataset=dataset.id,
            path=path,
            digest=row.digest,
            read=partial(self._reader_of[row.reader], *place),
            captions=self._captions(row),
            text_keys=self._text_keys(row),
            original_hw=(row.height, row.width),
            crops=tuple(self.crop(each) for each in range(row.crops, row.crops + row.crop_count)),
            facts_key=row.facts_key,
            rules=dataset.rules,
            limits=dataset.limits,
            meta=meta,
            thumbnail=bytes(facts[1:]) if facts[0] else None,
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def _add_texts(self, captions: Iterable[str]) -> tuple[int, int]:
        first = len(self._texts)
        for caption in captions:
            data = caption.encode()
            self._texts.append(_TEXT.pack(self._text_key(data), len(self._words), len(data)))
            self._words.append(data)
        return first, len(self._texts) - first

    def _add_words(self, path: str, place: Sequence[Any], meta: Mapping[str, MetaValue]) -> tuple[int, int]:
        data = msgpack.packb((path, place, meta), unicode_errors="surrogateescape")
        at = len(self._words)
        self._words.append(data)
        return at, len(data)

    def _row(self, index: int) -> _Row:
        return _Row._make(_ROW.unpack_from(self._rows.view, index * _ROW.size))

    def _captions(self, row: _Row) -> tuple[str, ...]:
        return tuple(self.text(index) for index in range(row.texts, row.texts + row.text_count))

    def _text_keys(self, row: _Row) -> tuple[bytes, ...]:
        texts = range(row.texts * _TEXT.size, (row.texts + row.text_count) * _TEXT.size, _TEXT.size)
        return tuple(bytes(self._texts.view[at : at + KEY_BYTES]) for at in texts)

    def _said(self, row: _Row) -> tuple[str, tuple[Any, ...], dict[str, MetaValue]]:
        data = self._words.view[row.words : row.words + row.word_count]
        path, place, meta = msgpack.unpackb(data, use_list=False, unicode_errors="surrogateescape")
        return path, place, meta

    def _plan(self, numbers: tuple[int, ...]) -> CropPlan:
        if (plan := self._plans.get(numbers)) is None:
            plan = unpacked(numbers)
            if len(self._plans) < MOST_PLANS:
                self._plans[numbers] = plan
        return plan


def packed(plan: CropPlan) -> bytes:
    """What follows the key of a crop in its column."""
    numbers = *plan.resize_hw, plan.box_top, plan.box_left, *plan.target_hw
    return _CROP.pack(bytes(KEY_BYTES), *numbers, plan.flip)[KEY_BYTES:]


def unpacked(numbers: Sequence[int]) -> CropPlan:
    """The plan that was packed as these numbers."""
    resize_h, resize_w, top, left, target_h, target_w, flip = numbers
    return CropPlan((resize_h, resize_w), top, left, (target_h, target_w), bool(flip))
