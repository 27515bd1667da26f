"""One row of a table, or one JSON object, to what a sample needs: its captions and what travels along as meta_*.

Row.values -> Columns.captions, Columns.meta -> Found; what a row holds is data, and what cannot be used is a DataError
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from cache_builder.captions import CaptionRules, parse_caption
from cache_builder.sources import MetaValue, Skipped
from cache_builder.sources.rows import csv_value
from cache_builder.sources.rules import SourceRules
from shared.errors import DataError

MAX_META_BYTES = 64 * 1024
NAMED = 100  # rows of one file that are named when they are left out; the rest are counted together


@dataclass(frozen=True)
class Columns:
    """How the columns of one data set are read; `csv_types` where its values are text that has yet to be typed."""

    rules: SourceRules
    caption_rules: CaptionRules
    csv_types: Mapping[str, type] = field(default_factory=dict)

    def captions(self, values: Mapping[str, Any], picture: str) -> tuple[str, ...]:
        """The captions of a row, or of the name of its `picture`; ("",) for one that is empty; raises DataError."""
        if self.rules.captions_from == "name":
            return name_caption(picture, self.caption_rules)
        names = self.rules.caption_columns
        value = first_filled(values, names)
        if value is None:
            return ("",) if any(values.get(name) == "" for name in names) else ()
        texts = value if isinstance(value, list | tuple) else [value]
        is_there = any(text is not None for text in texts)
        return parse_captions(texts, self.caption_rules) or (("",) if is_there else ())

    def meta(self, values: Mapping[str, Any]) -> dict[str, MetaValue]:
        """What travels along, by column; raises DataError."""
        wanted = self.rules.meta_columns
        if wanted is None:
            taken = {*self.rules.caption_columns, *self.rules.image_columns}
            wanted = tuple(name for name in values if name not in taken)
        found = ((name, self._meta_value(name, values[name])) for name in wanted if name in values)
        return {name: value for name, value in found if value is not None}

    def _meta_value(self, name: str, value: Any) -> MetaValue | None:
        if isinstance(value, str) and name in self.csv_types:
            value = csv_value(value, self.csv_types[name])
        try:
            _check_text(name)
            return meta_value(value)
        except DataError as error:
            raise DataError(f"column {name[:100]!r}: {error}") from None


def first_with_words(*found: tuple[str, ...]) -> tuple[str, ...]:
    """The first captions that say something, else ("",) where any are there, else ()."""
    return next((captions for captions in found if any(captions)), ()) or next(filter(None, found), ())


def first_filled(values: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The value of the first of `names` that holds something; None where none does."""
    return next((values[name] for name in names if values.get(name) not in (None, "", [])), None)


def parse_captions(texts: Sequence[Any], rules: CaptionRules) -> tuple[str, ...]:
    """Every text as a caption file would be read, without repetitions; raises DataError."""
    found: list[str] = []
    for text in texts:
        if text is None:
            continue
        if not isinstance(text, str):
            raise DataError(f"caption: a {type(text).__name__}, not text")
        try:
            found += parse_caption(text.encode(), rules)
        except UnicodeEncodeError:
            raise DataError("caption: holds half a surrogate pair, which is not text") from None
        except DataError as error:
            raise DataError(f"caption: {error}") from None
    captions = tuple(dict.fromkeys(found))
    return captions[:1] if rules.lines == "first" else captions


def name_caption(path: str, rules: CaptionRules) -> tuple[str, ...]:
    """The caption that a picture's name is: "a_red_cat.png" says "a red cat"."""
    stem = PurePosixPath(path).stem
    return parse_captions([stem.replace("_", " ")], rules)


def meta_value(value: Any) -> MetaValue | None:
    """`value` if it may travel along; None where there is none or it is of no such type; raises DataError."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise DataError("a whole number beyond 64 bits")
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value  # as pandas writes what is missing
    if isinstance(value, str):
        _check_text(value)
        return value
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        for item in value:
            _check_text(item)
        return tuple(value)
    return None


def _check_text(text: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise DataError("holds half a surrogate pair, which is not text") from None
    if size > MAX_META_BYTES:
        raise DataError(f"{size} bytes, more than {MAX_META_BYTES}")


class Complaints:
    """Why rows of one file are left out: the first ones by number, the rest together, so that a report stays small."""

    def __init__(self, file: str, unit: str) -> None:
        self._file, self._unit, self._count = file, unit, 0

    def skip(self, number: int | str, reason: str) -> Skipped:
        """The row `number` as something that is left out."""
        self._count += 1
        path = f"{self._file}/{number}"
        if self._count > NAMED:
            return Skipped(path, f"{self._file}: more {self._unit}s that cannot be used")
        return Skipped(path, f"{self._file} {self._unit} {number}: {reason}")
