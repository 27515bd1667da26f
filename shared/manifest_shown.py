"""What a batch shows of a manifest's rows, read off its mapped columns: no row is made an object for it.

A trainer asks for this in every step, of few rows at random; Arrow's way of taking rows costs as much for one as for a
thousand. One of the doors to Arrow's files.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

Columns = np.ndarray[Any, np.dtype[np.int32]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class ShownCrop:
    """One crop of a row: its record and its micro-conditioning; pixels of the resized picture, (h, w)."""

    latent_key: bytes
    crop_top_left: tuple[int, int]
    target_hw: tuple[int, int]


@dataclass(frozen=True)
class ShownRows:
    """Views of a manifest's columns; those of crops count the crops of all rows, one row's after another's."""

    original_hws: Columns  # pixels [rows, 2]
    variant_starts: Columns  # where a row's crops begin among all of them [rows + 1]
    latent_keys: Bytes  # [crops, 16]
    crop_tops: Columns  # pixels [crops]
    crop_lefts: Columns
    target_hws: Columns  # pixels [crops, 2]
    text_starts: Columns  # where a row's captions begin among all of them [rows + 1]
    text_keys: Bytes  # [captions, 16]

    def original_hw(self, row: int) -> tuple[int, int]:
        """Size of the row's picture, pixels."""
        return _pair(self.original_hws[row])

    def variant_count(self, row: int) -> int:
        """How many crops the row has."""
        return _count(self.variant_starts, row)

    def variant(self, row: int, which: int) -> ShownCrop:
        """One of the row's crops, counted from 0; raises IndexError where it has fewer."""
        at = _place(self.variant_starts, row, which)
        crop = int(self.crop_tops[at]), int(self.crop_lefts[at])
        return ShownCrop(self.latent_keys[at].tobytes(), crop, _pair(self.target_hws[at]))

    def text_count(self, row: int) -> int:
        """How many captions the row has."""
        return _count(self.text_starts, row)

    def text_key(self, row: int, which: int) -> bytes:
        """Key of one of the row's captions, counted from 0; raises IndexError where it has fewer."""
        key: bytes = self.text_keys[_place(self.text_starts, row, which)].tobytes()
        return key


def show_rows(table: pa.RecordBatch) -> ShownRows:
    """The views of a manifest's columns."""
    variants, texts = table.column("variants"), table.column("texts")
    crops = variants.flatten()
    return ShownRows(
        original_hws=_pairs(table.column("original_size_hw")),
        variant_starts=variants.offsets.to_numpy(),
        latent_keys=key_column(crops.field("latent_key")).view(np.uint8).reshape(-1, 16),
        crop_tops=crops.field("crop_top").to_numpy(),
        crop_lefts=crops.field("crop_left").to_numpy(),
        target_hws=_pairs(crops.field("target_hw")),
        text_starts=texts.offsets.to_numpy(),
        text_keys=key_column(texts.flatten()).view(np.uint8).reshape(-1, 16),
    )


def key_column(column: pa.Array) -> np.ndarray[Any, np.dtype[np.bytes_]]:
    """A binary(16) column without a copy, as what numpy sorts: S16, of which numpy cuts trailing zeros."""
    data = column.buffers()[1]
    first = 16 * column.offset
    return np.frombuffer(data, "S16", len(column), first) if len(column) else np.zeros(0, "S16")


def _pairs(column: pa.Array) -> Columns:
    pairs: Columns = column.flatten().to_numpy().reshape(-1, 2)
    return pairs


def _count(starts: Columns, row: int) -> int:
    return int(starts[row + 1] - starts[row])


def _place(starts: Columns, row: int, which: int) -> int:
    if not 0 <= which < _count(starts, row):
        raise IndexError(f"row {row} has {_count(starts, row)}, not {which + 1}")
    return int(starts[row]) + which


def _pair(values: Columns) -> tuple[int, int]:
    h, w = values.tolist()
    return h, w
