"""The first step of the second pass: pictures that lack something -> decoded, once, in threads -> batches of one size.

Memory is bounded by how many pictures are decoded before they are asked for, and by two batches of crops that wait for
others of their size.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from cache_builder.buckets import Size
from cache_builder.config import EncodeRules
from cache_builder.encode import Crop, Framed, Pixels
from cache_builder.keys import image_digest
from cache_builder.pixels import Picture as DecodedPicture
from cache_builder.pixels import decode_picture
from cache_builder.sample_rows import PlannedCrop
from cache_builder.split import Thumbnail
from cache_builder.todo import Picture, Pictures
from shared.errors import DataError
from shared.pictures import PixelLimits, PixelRules

T = TypeVar("T")
R = TypeVar("R")


class Decodable(Protocol):
    """What of a sample its decoding needs, here or in a worker on another machine."""

    @property
    def read(self) -> Callable[[], bytes]:
        """Gives the bytes of the picture, or raises DataError."""
        ...

    @property
    def digest(self) -> bytes:
        """Of these bytes, as the scan saw them."""
        ...

    @property
    def original_hw(self) -> Size:
        """Size of the upright picture, as its header said."""
        ...

    @property
    def rules(self) -> PixelRules:
        """How it is decoded."""
        ...

    @property
    def limits(self) -> PixelLimits:
        """What is decoded at all."""
        ...


class Cut(Protocol):
    """Something with one crop of a picture."""

    @property
    def crop(self) -> Crop:
        """Its pixels and its key."""
        ...


C = TypeVar("C", bound=Cut)


@dataclass(frozen=True)
class DecodedCrop:
    """What the encoder and the split need of one crop of a picture."""

    picture: Picture
    crop: Crop
    thumbnail: Thumbnail


@dataclass(frozen=True)
class Encoded:
    """What became of one crop: its record, or None where its latents are not finite."""

    picture: Picture
    key: bytes
    thumbnail: Thumbnail
    framed: Framed | None
    pixels: Pixels | None
    """None where another machine has them."""
    is_elsewhere: bool = False
    """Whether its record is in a shard already, and not here."""


def crop_batches(pictures: Pictures, rules: EncodeRules, lost: dict[bytes, str]) -> Generator[list[DecodedCrop]]:
    """All crops of `pictures`, at most rules.batch of one size at once, in their order: bucket by bucket.

    What cannot be decoded is put into `lost` instead: {latent key of each of its crops: why}.
    """
    ahead = 2 * rules.batch // pictures.most_crops + rules.threads
    pool = ThreadPoolExecutor(rules.threads, "decode")
    try:
        decoded = in_order(pool, _decode, pictures, ahead)
        yield from same_size_batches(_good_crops(decoded, lost), rules.batch)
    finally:
        pool.shutdown(cancel_futures=True)


def read_sample(sample: Decodable) -> bytes:
    """The bytes of the picture, if they are still what the scan saw; raises DataError."""
    data = sample.read()
    if image_digest(data) != sample.digest:
        raise DataError("changed since it was scanned; run the same command again")
    return data


def decode_sample(sample: Decodable, data: bytes | None = None) -> DecodedPicture:
    """The picture of a sample, whose bytes are read unless they are here; raises DataError."""
    decoded = decode_picture(read_sample(sample) if data is None else data, sample.rules, sample.limits)
    if decoded.size_hw != sample.original_hw:
        raise DataError("its size is not what its header says")
    return decoded


def cut(decoded: DecodedPicture, crops: Iterable[PlannedCrop], rules: PixelRules) -> list[Crop]:
    """Each of `crops` of a picture, ready to be encoded."""
    return [Crop(planned.latent_key, decoded.crop(planned.plan, rules)) for planned in crops]


def _decode(picture: Picture) -> list[DecodedCrop] | DataError:
    sample = picture.samples[0]
    try:
        decoded = decode_sample(sample)
    except DataError as error:
        return error
    thumb = decoded.thumbnail().tobytes()
    return [DecodedCrop(picture, crop, thumb) for crop in cut(decoded, picture.crops, sample.rules)]


def _good_crops(
    decoded: Iterable[tuple[Picture, list[DecodedCrop] | DataError]], lost: dict[bytes, str]
) -> Iterator[DecodedCrop]:
    for picture, crops in decoded:
        if isinstance(crops, DataError):
            lost.update((planned.latent_key, str(crops)) for planned in picture.crops)
        else:
            yield from crops


def in_order(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[tuple[T, R]]:
    """(item, work(item)) in order, at most `ahead` items begun before they are asked for."""
    begun: deque[tuple[T, Future[R]]] = deque()
    for item in items:
        begun.append((item, pool.submit(work, item)))
        if len(begun) > ahead:
            first, future = begun.popleft()
            yield first, future.result()
    while begun:
        first, future = begun.popleft()
        yield first, future.result()


def same_size_batches(crops: Iterable[C], size: int) -> Iterator[list[C]]:
    """Crops of one size, `size` at once; where more than two batches of crops wait, those that wait longest go."""
    waiting: dict[Size, list[C]] = {}
    count = 0
    for each in crops:
        size_hw = each.crop.size_hw
        batch = waiting.setdefault(size_hw, [])
        batch.append(each)
        count += 1
        if len(batch) == size or count > 2 * size:
            batch = waiting.pop(size_hw if len(batch) == size else next(iter(waiting)))
            count -= len(batch)
            yield batch
    yield from waiting.values()
