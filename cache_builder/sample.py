"""One sample of a build, as whoever works on one at a time has it; all of them are in samples.py."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from cache_builder.sample_rows import DataSet, PlannedCrop
from cache_builder.sources import MetaValue
from cache_builder.split import Thumbnail
from shared.pictures import PixelLimits, PixelRules

if TYPE_CHECKING:
    from cache_builder.samples import Samples


class Sample:
    """A picture of one data set with all that its row in the manifest needs; each is looked up when it is asked for."""

    __slots__ = ("_row", "_samples", "index")

    def __init__(self, samples: "Samples", index: int) -> None:
        self.index, self._samples, self._row = index, samples, samples.row(index)

    @property
    def dataset(self) -> str:
        """Id of its data set."""
        return self._dataset.id

    @property
    def path(self) -> str:
        """Where it is, as its source says."""
        return str(self._samples.said(self._row)[0])

    @property
    def read(self) -> "partial[bytes]":
        """Gives the bytes of the picture, or raises DataError."""
        return partial(self._samples.reader(self._row), *self._samples.said(self._row)[1])

    @property
    def meta(self) -> Mapping[str, MetaValue]:
        """What travels along, by column."""
        return self._samples.said(self._row)[2] if self._row.has_meta else {}

    @property
    def digest(self) -> bytes:
        """Of the bytes of the picture."""
        return self._row.digest

    @property
    def facts_key(self) -> bytes:
        """Key of what decoding finds out of it."""
        return self._row.facts_key

    @property
    def original_hw(self) -> tuple[int, int]:
        """Size of the upright picture."""
        return self._row.height, self._row.width

    @property
    def captions(self) -> tuple[str, ...]:
        """Its texts."""
        return tuple(map(self._samples.text, self._row.its_texts()))

    @property
    def text_keys(self) -> tuple[bytes, ...]:
        """Their keys."""
        return tuple(map(self._samples.text_key, self._row.its_texts()))

    @property
    def crops(self) -> tuple[PlannedCrop, ...]:
        """Its crops, the first one first."""
        return tuple(map(self._samples.crop, range(self._row.crops, self._row.crops + self._row.crop_count)))

    @property
    def rules(self) -> PixelRules:
        """How it is decoded."""
        return self._dataset.rules

    @property
    def limits(self) -> PixelLimits:
        """What is decoded at all."""
        return self._dataset.limits

    @property
    def thumbnail(self) -> Thumbnail | None:
        """None until the picture has been decoded, in this build or an earlier one."""
        return self._samples.thumbnail(self.index)

    @property
    def _dataset(self) -> DataSet:
        return self._samples.datasets[self._row.source]
