"""Decodes pictures and encodes a few, and throws the result away: how long a build will take, and what it will refuse.

todo.py -> decode_pictures -> what cannot be decoded
        -> rehearse -> Timing
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cache_builder.config import BuildConfig
from cache_builder.decoding import decode_sample
from cache_builder.encode import Crop, SampleEncoder
from cache_builder.key_arrays import Indices
from cache_builder.samples import Samples
from cache_builder.todo import Picture, Pictures, Todo, batches
from shared.errors import DataError
from shared.progress import progress

ENOUGH_S = 10.0  # of encoding; a slow device is timed on fewer crops


@dataclass(frozen=True)
class Timing:
    """What a sample of the work took, and what all of it will take by that."""

    crops: int  # timed together, of the most frequent size
    crop_s: float  # to encode one of them
    decode_s: float  # to decode and cut one of them, in one thread
    captions: int
    caption_s: float
    load_s: float  # until both models had encoded something
    needed_s: float  # for everything that is missing: loading, captions, and crops while others are decoded


def decode_pictures(pictures: Pictures, threads: int) -> dict[bytes, str]:
    """Decode each of them; returns why what picture, by its facts key, cannot be."""
    lost: dict[bytes, str] = {}
    with ThreadPoolExecutor(threads) as pool, progress("pictures", len(pictures), "decoded") as advance:
        for part in batches(pictures, 16 * threads):
            reasons = pool.map(_reason, part)
            lost |= {one.samples[0].facts_key: why for one, why in zip(part, reasons, strict=True) if why is not None}
            advance(len(part))
    return lost


def rehearse(
    samples: Samples, todo: Todo, config: BuildConfig, encoder: SampleEncoder, devices: int
) -> tuple[Timing, dict[bytes, str]]:
    """Time a sample of `todo`, of which as many `devices` will share the work; also what could not be decoded, and why.

    The second is by facts keys.
    """
    texts = [samples.text(index) for index in todo.texts[: config.encode.text_batch].tolist()]
    load_s = caption_s = crop_s = 0.0
    count = 0
    if texts:
        keys = [bytes(16)] * len(texts)
        load_s += _timed(lambda: encoder.encode_captions(texts[:1], keys[:1]))
        caption_s = _timed(lambda: encoder.encode_captions(texts, keys)) / len(texts)
    missing = todo.pictures.crops
    sizes, members = np.unique(samples.crops["target_hw"][missing], axis=0, return_inverse=True)
    counts = np.bincount(members.reshape(-1), minlength=len(sizes))
    crops, decode_s, lost = _decode_some(samples, _most_frequent(missing, members, counts), config.encode.batch)
    if crops:
        load_s += _timed(lambda: encoder.encode_crops(crops[:1]))
        count, crop_s = _time_crops(crops, encoder)
    needed_s = load_s + caption_s * len(todo.texts) / devices
    if crops:
        area = int((counts * sizes.astype(np.int64).prod(axis=1)).sum()) / crops[0].pixels[..., 0].size
        needed_s += max(crop_s * area / devices, decode_s * len(missing) / config.encode.threads)
    return Timing(count, crop_s, decode_s, len(texts), caption_s, load_s, needed_s), lost


def _most_frequent(crops: Indices, members: Indices, counts: Indices) -> Indices:
    """Those of `crops` that are of the size that most of them have; the largest of several such."""
    if not len(crops):
        return crops
    common = len(counts) - 1 - int(np.argmax(counts[::-1]))
    return np.asarray(crops[members.reshape(-1) == common])


def _decode_some(samples: Samples, crops: Indices, count: int) -> tuple[list[Crop], float, dict[bytes, str]]:
    """At most `count` of `crops`, spread over them, and what one took, seconds."""
    lost: dict[bytes, str] = {}
    found: list[Crop] = []
    begun_s = time.monotonic()
    for index in crops[:: max(1, len(crops) // count)][:count].tolist():
        sample, planned = samples[int(samples.of_crop(index))], samples.crop(index)
        try:
            found.append(Crop(planned.latent_key, decode_sample(sample).crop(planned.plan, sample.rules)))
        except DataError as error:
            lost[sample.facts_key] = str(error)
    return found, (time.monotonic() - begun_s) / max(1, len(found)), lost


def _time_crops(crops: Sequence[Crop], encoder: SampleEncoder) -> tuple[int, float]:
    """How many were timed, and seconds for one of them."""
    one_s = _timed(lambda: encoder.encode_crops(crops[:1]))
    count = min(len(crops), int(ENOUGH_S / one_s))
    if count < 2:
        return 1, one_s
    encoder.encode_crops(crops[:count])  # a batch of another size is slow the first time
    return count, _timed(lambda: encoder.encode_crops(crops[:count])) / count


def _timed(work: Callable[[], object]) -> float:
    begun_s = time.monotonic()
    work()
    return max(time.monotonic() - begun_s, 1e-9)


def _reason(picture: Picture) -> str | None:
    try:
        decode_sample(picture.samples[0])
    except DataError as error:
        return str(error)
    return None
