"""A chunk of a build on many machines <-> bytes: which pictures are to be encoded, and what became of them.

Pictures -> Chunk -> pack | Ray | unpack -> ray_worker.py -> pack | Ray | unpack -> fill.py commits

Nothing of it is pickled: a message is [u32 length of the header | header: msgpack | blobs], as encoder_process.py
has it. A picture travels as the place where it lies, or as the bytes of its file where only this machine can read it.
"""

import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cache_builder.decoding import Decodable, read_sample
from cache_builder.encoder_process import read_message, write_message
from cache_builder.places import open_place
from cache_builder.sample import Sample
from cache_builder.sample_rows import PlannedCrop, plan_numbers, unpacked
from cache_builder.sources.trees import BucketTree, FolderTree, Tree, is_bucket
from cache_builder.todo import Picture
from shared.errors import DataError
from shared.pictures import PixelLimits, PixelRules

MOST_SENT_BYTES = 64 << 20  # of files in one message
_WAYS = ("read", "read_entry", "read_span")  # of a Tree, by which a picture may be asked for

Header = dict[str, Any]
Place = tuple[str, str, tuple[Any, ...]]  # address of a tree, one of its ways to read, what that is told


def pack(header: Header, blobs: Sequence[Any] = ()) -> bytes:
    """A message as bytes."""
    out = io.BytesIO()
    write_message(out, header, blobs)
    return out.getvalue()


def unpack(message: bytes) -> tuple[Header, list[bytearray]]:
    """What `pack` was told."""
    return read_message(io.BytesIO(message))


def place_of(sample: Sample) -> Place | None:
    """Where others find the picture of a sample; None where only its source can read it, as out of a Parquet file."""
    reader, arguments = sample.read.func, sample.read.args
    tree, way = getattr(reader, "__self__", None), getattr(reader, "__name__", "")
    if way not in _WAYS:
        return None
    if isinstance(tree, FolderTree):
        return os.path.abspath(tree.root), way, arguments
    return (tree.place.address, way, arguments) if isinstance(tree, BucketTree) else None


def pictures_message(pictures: Sequence[Picture], files: Sequence[bytes] | None, rules: Header) -> bytes:
    """What a worker needs of `pictures`; their `files` where it is not to read them itself."""
    rows = [_row(picture, None if files else place_of(picture.samples[0])) for picture in pictures]
    return pack({"pictures": rows, "rules": rules}, files or ())


def _row(picture: Picture, place: Place | None) -> list[Any]:
    sample = picture.samples[0]
    crops = [[crop.latent_key, plan_numbers(crop.plan)] for crop in picture.crops]
    return [
        place,
        sample.digest,
        sample.facts_key,
        sample.original_hw,
        astuple(sample.rules),
        astuple(sample.limits),
        crops,
    ]


def read_here(
    pictures: Iterable[Picture], lost: dict[bytes, str], most: int
) -> Iterator[tuple[list[Picture], list[bytes]]]:
    """Pictures with the bytes of their files, at most `most` at once; `lost` is told of those that cannot be read."""
    chunk: list[tuple[Picture, bytes]] = []
    for picture in pictures:
        try:
            chunk.append((picture, read_sample(picture.samples[0])))
        except DataError as error:
            lost.update((crop.latent_key, str(error)) for crop in picture.crops)
        if len(chunk) == most or sum(len(data) for _, data in chunk) > MOST_SENT_BYTES:
            yield [each for each, _ in chunk], [data for _, data in chunk]
            chunk = []
    if chunk:
        yield [each for each, _ in chunk], [data for _, data in chunk]


def alike(pictures: Iterable[Picture], most: int) -> Iterator[tuple[bool, list[Picture]]]:
    """Pictures in order, at most `most` at once, and whether a worker can read all of these itself."""
    by_way = itertools.groupby(pictures, lambda picture: place_of(picture.samples[0]) is not None)
    for is_placed, some in by_way:
        while chunk := list(itertools.islice(some, most)):
            yield is_placed, chunk


@dataclass(frozen=True)
class SentSample:
    """A picture as a worker was told of it."""

    read: Callable[[], bytes]
    digest: bytes
    original_hw: tuple[int, int]
    rules: PixelRules
    limits: PixelLimits


@dataclass(frozen=True)
class SentPicture:
    """It, and which of its crops are wanted; `is_sent` says that its bytes came along."""

    index: int
    facts_key: bytes
    sample: Decodable
    crops: list[PlannedCrop]
    is_sent: bool


def sent_pictures(header: Header, blobs: Sequence[bytearray], trees: "Trees") -> list[SentPicture]:
    """The pictures of a message, on the worker's side."""
    found = []
    for index, (place, digest, facts_key, size_hw, rules, limits, crops) in enumerate(header["pictures"]):
        read = partial(bytes, blobs[index]) if place is None else partial(trees.read, place)
        background, resample = rules
        sample = SentSample(read, digest, tuple(size_hw), PixelRules(tuple(background), resample), PixelLimits(*limits))
        planned = [PlannedCrop(unpacked(numbers), key) for key, numbers in crops]
        found.append(SentPicture(index, facts_key, sample, planned, place is None))
    return found


class Trees:
    """The folders and buckets that a worker has met; each is opened once."""

    def __init__(self) -> None:
        self._opened: dict[str, Tree] = {}

    def read(self, place: Sequence[Any]) -> bytes:
        """The bytes of a picture; raises DataError."""
        address, way, arguments = place
        if way not in _WAYS:
            raise DataError(f"no way to read: {way}")
        if (tree := self._opened.get(address)) is None:
            tree = BucketTree(open_place(address)) if is_bucket(address) else FolderTree(Path(address))
            self._opened[address] = tree
        data: bytes = getattr(tree, way)(*arguments)
        return data
