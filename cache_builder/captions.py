"""The words of a picture: a sidecar file's bytes -> captions; a source reads the file, the builder encodes them.

Captions are data. They are kept letter for letter but for white space at their ends: keys are made from these bytes.
What the rules then make of a caption stands in texts.py.
"""

import codecs
import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from shared.config import Config
from shared.errors import DataError

MAX_CAPTION_BYTES = 64 * 1024
_LINE_END = re.compile(r"\r\n|\r|\n")  # not str.splitlines, which also cuts at U+2028, U+0085, form feeds


class CaptionVariants(Config):
    """Captions that are lists of tags, stored in several orders; each picture has orders of its own."""

    count: int = Field(1, ge=1, le=64)
    """Texts made of each caption: itself, and count - 1 shuffled or thinned ones; equal ones are stored once."""
    split_on: str = Field(",", min_length=1)
    """What stands between tags; they are joined by it and a space."""
    keep_first: int = Field(0, ge=0)
    """Tags at the start that stay where they are."""
    shuffle: bool = True
    """Whether the other tags change places."""
    drop: float = Field(0.0, ge=0, lt=1)
    """Chance of each of the other tags to be left out; one tag always stays."""

    @model_validator(mode="after")
    def _varies(self) -> "CaptionVariants":
        if self.count > 1 and not self.shuffle and not self.drop:
            raise ValueError(f"count = {self.count} would store one text: set shuffle = true or drop above 0")
        return self


class CaptionRules(Config):
    """How captions are found beside a picture and read, and which texts are made of them."""

    missing: Literal["error", "skip", "empty"] = "error"
    """What a picture without a caption is: an error, left out, or trained with the empty caption."""

    empty: Literal["missing", "skip", "empty"] = "missing"
    """The same for a caption that holds no word, or none that `remove` leaves; "missing" is what `missing` says."""

    remove: tuple[str, ...] = ()
    """Strings that are taken out of captions."""

    remove_patterns: tuple[str, ...] = ()
    """Regular expressions (RE2 syntax) whose matches are taken out of captions, after `remove`."""

    trigger: str = ""
    """Words that every caption begins with, also an empty one; not said twice where a caption has them."""

    prefix: str = ""
    """Text put directly in front of what is not empty, spaces and all."""

    suffix: str = ""
    """Text put directly behind what is not empty, spaces and all."""

    lines: Literal["all", "first", "whole"] = "all"
    """Every line is a caption of its own, only the first one counts, or the whole file is one caption."""

    extensions: tuple[str, ...] = (".txt", ".caption")
    """Suffixes of caption files, in order; the first file that exists is read."""

    variants: CaptionVariants = CaptionVariants()

    @field_validator("trigger", "prefix", "suffix")
    @classmethod
    def _is_one_line(cls, text: str) -> str:
        if any(char in text for char in "\n\r\0"):
            raise ValueError("a caption is one line: no line ends, no NUL")
        return text

    @field_validator("remove")
    @classmethod
    def _removes_something(cls, strings: tuple[str, ...]) -> tuple[str, ...]:
        if "" in strings:
            raise ValueError('the empty string "" is found everywhere: leave it out')
        return strings

    @field_validator("remove_patterns")
    @classmethod
    def _are_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        if patterns:
            from cache_builder.patterns import check_pattern  # Arrow takes a quarter of a second to import

            for pattern in patterns:
                check_pattern(pattern)
        return patterns

    @field_validator("extensions")
    @classmethod
    def _are_suffixes(cls, extensions: tuple[str, ...]) -> tuple[str, ...]:
        for extension in extensions:
            if not re.fullmatch(r"\.[^/\0]*[^/\0.]", extension):
                raise ValueError(f'{extension!r} is not a file suffix such as ".txt"')
        return extensions


def parse_caption(data: bytes, rules: CaptionRules) -> tuple[str, ...]:
    """The captions in `data`, at most 64 KiB of UTF-8, without repetitions; () if there is none; raises DataError."""
    text = _decode(data)
    if rules.lines == "whole":
        text = " ".join(text.split())
    if "\n" not in text and "\r" not in text:  # nearly every caption file, and most of what reading one costs
        return (line,) if (line := text.strip()) else ()
    captions = tuple(dict.fromkeys(line for part in _LINE_END.split(text) if (line := part.strip())))
    return captions[:1] if rules.lines == "first" else captions


def _decode(data: bytes) -> str:
    if len(data) > MAX_CAPTION_BYTES:
        raise DataError(f"{len(data)} bytes, more than {MAX_CAPTION_BYTES}")
    if b"\0" in data:
        raise DataError("holds a NUL byte; is it UTF-16? UTF-8 is read")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()  # a third of what the codec "utf-8-sig" takes
    except UnicodeDecodeError:
        pass
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start}") from None
