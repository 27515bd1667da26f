"""The words of a picture: a sidecar file's bytes -> captions; a source reads the file, the builder encodes them.

Captions are data. They are kept letter for letter but for white space at their ends: keys are made from these bytes.
"""

import re
from typing import Literal

from pydantic import field_validator

from shared.config import Config
from shared.errors import DataError

MAX_CAPTION_BYTES = 64 * 1024
_LINE_END = re.compile(r"\r\n|\r|\n")  # not str.splitlines, which also cuts at U+2028, U+0085, form feeds


class CaptionRules(Config):
    """How captions are found beside a picture and read."""

    missing: Literal["error", "skip", "empty"] = "error"
    """What a picture without a caption is: an error, left out, or trained with the empty caption."""

    lines: Literal["all", "first", "whole"] = "all"
    """Every line is a caption of its own, only the first one counts, or the whole file is one caption."""

    extensions: tuple[str, ...] = (".txt", ".caption")
    """Suffixes of caption files, in order; the first file that exists is read."""

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
    lines = [" ".join(text.split())] if rules.lines == "whole" else [line.strip() for line in _LINE_END.split(text)]
    captions = tuple(dict.fromkeys(line for line in lines if line))
    return captions[:1] if rules.lines == "first" else captions


def _decode(data: bytes) -> str:
    if len(data) > MAX_CAPTION_BYTES:
        raise DataError(f"{len(data)} bytes, more than {MAX_CAPTION_BYTES}")
    if b"\0" in data:
        raise DataError("holds a NUL byte; is it UTF-16? UTF-8 is read")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start}") from None
