"""One look at each picture of a scan: its digest and size, from what is known of it or from its bytes.

source.scan() -> look_at -> Seen, in the order of the source and a batch behind it -> scan.py

What the scan cache knows is not opened, and where it has the facts no record of the store is read either: they are
kept beside the digest, under the key that they have in the store. Of the rest, large files are read and hashed in
threads (reading and hashing let other threads run), small ones at once, a batch in one transaction: handing one over
costs more than it saves.
"""

import itertools
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from cache_builder.keys import facts_keys_under, image_digest
from cache_builder.scan_cache import ScanCache, State
from cache_builder.sources import Found
from cache_builder.split import THUMBNAIL_BYTES, Thumbnail
from shared.errors import DataError, RecordCorrupt
from shared.pictures import PixelLimits, PixelRules, read_size
from shared.snapshot import Snapshot
from shared.store import Store

FILES_AT_ONCE = 256  # looked up in one read transaction
WORTH_A_THREAD_BYTES = 64 << 10
SLOW_AT_ONCE = 32  # asked of a server together

_DIGEST_BYTES = 32
_FACTS = struct.Struct(f"<16sII{THUMBNAIL_BYTES}s")  # what may stand behind a picture's digest in the scan cache

T = TypeVar("T")
Facts = tuple[tuple[int, int], Thumbnail]


class Seen(NamedTuple):
    """What a scan needs of one picture; without a thumbnail where no build has decoded it yet."""

    digest: bytes
    facts_key: bytes
    size_hw: tuple[int, int]
    thumbnail: Thumbnail | None


class Unusable(NamedTuple):
    """A picture that a scan cannot use, and why."""

    reason: str


Look = Seen | Unusable


@dataclass(frozen=True)
class Looker:
    """Looks at pictures under one set of rules."""

    rules: PixelRules
    limits: PixelLimits
    store: Store
    cache: ScanCache
    facts_key: Callable[[bytes], bytes] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "facts_key", facts_keys_under(self.rules))

    def remembered(self, items: Sequence[Found]) -> list[tuple[State | None, Seen | None]]:
        """For each picture its file's state, and what is known of it without its bytes, if all is."""
        states = [_state(item) for item in items]
        with self.store.snapshot() as snapshot:
            return [(state, self._known(item, state, snapshot)) for item, state in zip(items, states, strict=True)]

    def read_alone(self, item: Found, state: State | None) -> Look:
        """What the bytes of a picture say, from any thread."""
        return self.read(item, state, None)

    def read(self, item: Found, state: State | None, snapshot: Snapshot | None) -> Look:
        """The same, with what stands in `snapshot` of the store, or in one of its own."""
        try:
            data = item.read()
            digest = image_digest(data)
            key = self.facts_key(digest)
            facts = self._stored(key) if snapshot is None else _facts(key, snapshot)
            size_hw, thumbnail = facts or (read_size(data, self.limits), None)
        except DataError as error:
            return Unusable(str(error))  # not the error itself, which would hold on to the bytes
        if state is not None and self.cache.would_keep(state) and (after := _state(item)) is not None:
            self.cache.put("picture", item.path, state, after, _remember(digest, key, facts))
        return Seen(digest, key, size_hw, thumbnail)

    def _stored(self, key: bytes) -> Facts | None:
        with self.store.snapshot() as snapshot:
            return _facts(key, snapshot)

    def _known(self, item: Found, state: State | None, snapshot: Snapshot) -> Seen | None:
        if state is None or (value := self.cache.get("picture", item.path, state)) is None:
            return None
        digest = value[:_DIGEST_BYTES]
        key = self.facts_key(digest)
        if len(value) > _DIGEST_BYTES:
            of_key, height, width, thumbnail = _FACTS.unpack_from(value, _DIGEST_BYTES)
            if of_key == key:  # they were found under these rules for pixels
                return Seen(digest, key, (height, width), thumbnail)
        if facts := _facts(key, snapshot):
            self.cache.learn("picture", item.path, state, _remember(digest, key, facts))
            return Seen(digest, key, *facts)
        return None


def look_at(looker: Looker, items: Iterable[tuple[Found, T]], threads: int) -> Iterator[tuple[tuple[Found, T], Look]]:
    """Each item, in order, with what is seen of it."""
    rest, begun = iter(items), deque[Iterator[tuple[tuple[Found, T], Look]]]()
    # Pools start no thread before there is work.
    with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(SLOW_AT_ONCE) as waiting:
        while batch := list(itertools.islice(rest, FILES_AT_ONCE)):
            found = looker.remembered([item for item, _ in batch])
            looks = [_begin(looker, item, *each, pool, waiting) for (item, _), each in zip(batch, found, strict=True)]
            with looker.store.snapshot() as snapshot:
                for index, look in enumerate(looks):
                    if look is None:
                        looks[index] = looker.read(batch[index][0], found[index][0], snapshot)
            begun.append(zip(batch, map(_awaited, looks), strict=True))
            if len(begun) > 1:  # threads have the next batch to read while the caller walks on and sees this one
                yield from begun.popleft()
        yield from itertools.chain.from_iterable(begun)


def _begin(
    looker: Looker,
    item: Found,
    state: State | None,
    seen: Seen | None,
    pool: ThreadPoolExecutor,
    waiting: ThreadPoolExecutor,
) -> "Future[Look] | Look | None":
    """What is known, or what a thread finds out; None for a small file, which is read at once."""
    if seen is not None:
        return seen
    if item.is_slow:
        return waiting.submit(looker.read_alone, item, state)
    if state is not None and state[0] < WORTH_A_THREAD_BYTES:
        return None
    return pool.submit(looker.read_alone, item, state)


def _awaited(look: "Future[Look] | Look | None") -> Look:
    assert look is not None
    return look.result() if isinstance(look, Future) else look


def _state(item: Found) -> State | None:
    try:
        return item.look() if item.look else None
    except OSError:
        return None  # reading it says why


def _remember(digest: bytes, key: bytes, facts: Facts | None) -> bytes:
    return digest + _FACTS.pack(key, *facts[0], facts[1]) if facts else digest


def _facts(key: bytes, snapshot: Snapshot) -> Facts | None:
    """What an earlier build found out of a picture; None where it has to be found out."""
    try:
        record = snapshot.read(key)
        height, width = record.meta["original_hw"]
        return (height, width), record.tensors["thumbnail"].tobytes()  # not all of its record
    except RecordCorrupt:  # or absent
        return None
