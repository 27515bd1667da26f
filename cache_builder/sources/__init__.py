"""Where pictures come from: one small class per kind of source, each behind the `Source` protocol.

source.scan() -> Found | Skipped, in a fixed order -> build.py. Everything that is a picture by its name comes out as
one or the other, so that what was seen is accounted for; other files are only tallied in `passed_over`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

from cache_builder.scan_cache import ScanCache, State
from shared.manifest_rows import MetaValue

__all__ = ["NO_META", "Found", "MetaValue", "Remembering", "Skipped", "Source"]


NO_META: Mapping[str, MetaValue] = {}


class Found(NamedTuple):
    """A picture that can be read; `captions` is () where it has none and ("",) where it has an empty one."""

    path: str
    """Relative to the data set's root, with "/"; SHARD.parquet/ROW or SHARD.tar/NAME where it is no file of its own."""

    captions: tuple[str, ...]

    read: partial[bytes]
    """The picture's bytes, as often as they are asked for and from any thread; raises DataError.

    Of one of a few functions, and of texts and numbers: these are kept outside of memory until the picture is decoded.
    """

    meta: Mapping[str, MetaValue] = NO_META
    """What else is known of it, by column."""

    look: Callable[[], State] | None = None
    """What changes when the file that its bytes come from does; None where only reading tells. Raises OSError."""

    is_slow: bool = False
    """Whether reading it waits for a server, so that many are asked for at once."""


@dataclass(frozen=True)
class Skipped:
    """A picture that is left out, and why; `path` is printable UTF-8 even if the name is not."""

    path: str
    reason: str


@runtime_checkable
class Remembering(Protocol):
    """A source that need not read again what a scan cache knows of its files."""

    cache: ScanCache
    """Asked and told by the next scan."""


class Source(Protocol):
    """One data set."""

    dataset_id: str
    passed_over: Counter[str]
    """Files of the last scan that were neither read nor captions in use, by suffix: for "no pictures" messages."""
    containers: int
    """How many tables or shards the last scan met; 0 where pictures are files of their own."""

    def scan(self) -> Iterator[Found | Skipped]:
        """Everything that should be a picture, in an order that names and rows decide; raises DataError at once."""
        ...
