"""Where pictures come from: one small class per kind of source, each behind the `Source` protocol.

source.scan() -> Found | Skipped, in a fixed order -> build.py. Everything that is a picture by its name comes out as
one or the other, so that what was seen is accounted for; other files are only tallied in `passed_over`.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Found:
    """A picture that can be read; `captions` is () where it has none and ("",) where it has an empty one."""

    path: str
    """Relative to the data set's root, with "/"; data, never opened as it stands."""

    captions: tuple[str, ...]

    read: Callable[[], bytes]
    """The file's bytes; raises DataError."""


@dataclass(frozen=True)
class Skipped:
    """A picture that is left out, and why; `path` is printable UTF-8 even if the name is not."""

    path: str
    reason: str


class Source(Protocol):
    """One data set."""

    dataset_id: str
    passed_over: Counter[str]
    """Files of the last scan that were neither pictures nor captions in use, by suffix: for "no pictures" messages."""

    def scan(self) -> Iterator[Found | Skipped]:
        """Everything that is a picture by its name, in an order that depends on the names alone; raises DataError."""
        ...
