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

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import msgpack
import numpy as np

from cache_builder.buckets import CropPlan
from cache_builder.key_arrays import Indices, Kind
from cache_builder.keys import KeyOf
from cache_builder.sample import Sample
from cache_builder.sample_rows import (
    CROP,
    CROP_DTYPE,
    FACTS_DTYPE,
    NO_FACTS,
    ROW,
    ROW_DTYPE,
    TEXT,
    TEXT_DTYPE,
    DataSet,
    PlannedCrop,
    Row,
    unpacked,
)
from cache_builder.sources import Found, MetaValue
from cache_builder.split import Thumbnail
from shared.record import KEY_BYTES
from shared.scratch import Column, outside

ROWS_AT_ONCE = 4096
MOST_PLANS = 4096  # that are kept as they are; random crops have plans of their own


class Samples(Sequence[Sample]):
    """The samples of a build, in the order of their sources."""

    def __init__(self, key_of_text: KeyOf, folder: Path | None = None) -> None:
        """Their columns lie in `folder`; `key_of_text` makes the key of a caption's UTF-8."""
        self._key_of_text, self.folder = key_of_text, folder
        self._rows, self._facts = Column(ROW_DTYPE, folder), Column(FACTS_DTYPE, folder)
        self._crops, self._texts = Column(CROP_DTYPE, folder), Column(TEXT_DTYPE, folder)
        self._words = Column("u1", folder)
        self.datasets: list[DataSet] = []
        self._readers: dict[Any, int] = {}
        self._reader_of: list[Callable[..., bytes]] = []
        self._plans: dict[tuple[int, ...], CropPlan] = {}
        self._packer = msgpack.Packer(unicode_errors="surrogateescape")  # a new one takes longer than packing

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
        first = self._crops.append(b"".join(crops)) // CROP.size
        numbers = len(self.datasets) - 1, reader, first, len(crops), texts, text_count, at, size
        self._rows.append(ROW.pack(digest, facts_key, *size_hw, *numbers, is_sided, bool(found.meta)))
        self._facts.append(NO_FACTS if thumbnail is None else b"\1" + thumbnail)

    def add_text(self, text: str) -> int:
        """Add a text that is no sample's caption; which of the texts it is. Once the samples are settled."""
        return self._add_texts([text])[0]

    def merge(self, one: int, others: Sequence[int]) -> None:
        """Give sample `one` the captions and meta of `others` too, which have the same picture."""
        rows = [self.row(index) for index in (one, *others)]
        captions = dict.fromkeys(self.text(text) for row in rows for text in row.its_texts())
        texts, count = self._add_texts([*captions])
        path, place, meta = self.said(rows[0])
        for row in rows[1:]:
            meta = {**self.said(row)[2], **meta}
        at, size = self._add_words(path, place, meta)
        merged = rows[0]._replace(texts=texts, text_count=count, words=at, word_count=size, has_meta=bool(meta))
        self._rows.put(one, ROW.pack(*merged._replace(is_sided=any(row.is_sided for row in rows))))

    def keep_crops(self, index: int, count: int) -> None:
        """Leave sample `index` its first `count` crops."""
        self._rows.put(index, ROW.pack(*self.row(index)._replace(crop_count=count)))

    def only(self, kept: Indices) -> "Samples":
        """Those at `kept`, ascending, with nothing between their crops and texts."""
        left = Samples(self._key_of_text, self.folder)
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

    @property
    def nbytes(self) -> int:
        """What the columns take of the disk that `folder` is on."""
        return sum(column.nbytes for column in (self._rows, self._facts, self._crops, self._texts, self._words))

    def of_crop(self, crops: Indices) -> Indices:
        """Which samples these `crops` are of."""
        starts = self.rows["crops"].astype(np.asarray(crops).dtype)  # of another kind numpy would copy both, as floats
        return np.searchsorted(starts, crops, side="right") - 1

    def outside(self, array: np.ndarray[Any, Kind]) -> np.ndarray[Any, Kind]:
        """The same where the samples are, out of memory."""
        return outside(array, self.folder)

    def text(self, index: int) -> str:
        """One of the texts."""
        _, at, length = TEXT.unpack_from(self._texts.view, index * TEXT.size)
        return str(self._words.view[at : at + length], "utf-8")

    def text_key(self, index: int) -> bytes:
        """Its key."""
        return bytes(self._texts.view[index * TEXT.size : index * TEXT.size + KEY_BYTES])

    def thumbnail(self, index: int) -> Thumbnail | None:
        """What is known of the picture of a sample."""
        facts = self._facts.view[index * len(NO_FACTS) : (index + 1) * len(NO_FACTS)]
        return bytes(facts[1:]) if facts[0] else None

    def row(self, index: int) -> Row:
        """What is known of a sample at once."""
        return Row._make(ROW.unpack_from(self._rows.view, index * ROW.size))

    def said(self, row: Row) -> tuple[str, tuple[Any, ...], dict[str, MetaValue]]:
        """Path, what its source reads it by, and what travels along."""
        data = self._words.view[row.words : row.words + row.word_count]
        path, place, meta = msgpack.unpackb(data, use_list=False, unicode_errors="surrogateescape")
        return path, place, meta

    def reader(self, row: Row) -> Callable[..., bytes]:
        """What its source reads it with."""
        return self._reader_of[row.reader]

    def crop(self, index: int) -> PlannedCrop:
        """One of the crops."""
        key, *numbers = CROP.unpack_from(self._crops.view, index * CROP.size)
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
        return Sample(self, index)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def _add_texts(self, captions: Sequence[str]) -> tuple[int, int]:
        rows = b""
        for caption in captions:
            data = caption.encode()
            rows += TEXT.pack(self._key_of_text(data), self._words.append(data), len(data))
        return self._texts.append(rows) // TEXT.size, len(captions)

    def _add_words(self, path: str, place: Sequence[Any], meta: Mapping[str, MetaValue]) -> tuple[int, int]:
        data = self._packer.pack((path, place, meta))
        return self._words.append(data), len(data)

    def _plan(self, numbers: tuple[int, ...]) -> CropPlan:
        if (plan := self._plans.get(numbers)) is None:
            plan = unpacked(numbers)
            if len(self._plans) < MOST_PLANS:
                self._plans[numbers] = plan
        return plan
