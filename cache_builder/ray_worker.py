"""One encoder of a Ray cluster: bytes in, bytes out. Knows nothing of Ray, nor of the store.

ray_runner.py -> message -> Worker: read | decode, in threads | encode -> answer -> ray_runner.py

    told      {"model", "device", "dtype", "latents", "chunks", "expects", "threads", "to"}
    job       {"pictures": [...], "rules": {...}} or {"keys": [...], "captions": [...]}    chunks.py
    answer    {"made": [[picture, key, thumbnail, is_finite], ...], "lost": [[picture, why], ...],
               "unread": [[picture, why], ...]}
              {"keys": [...]}                                                    with the framed records as blobs
              with "to", an address, records go into a shard there, and {"shard": its row} comes in their place
              {"error": class, "message": str}                                   of shared.errors
"""

import platform
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cache_builder.chunks import Header, SentPicture, Trees, pack, sent_pictures, unpack
from cache_builder.decoding import cut, decode_sample, in_order, read_sample, same_size_batches
from cache_builder.encode import Crop, Framed, SampleEncoder, facts_record
from cache_builder.encoder_process import known_class
from cache_builder.keys import KEY_FORMAT
from cache_builder.places import Place, open_place
from cache_builder.split import Thumbnail
from cache_builder.transfer.shard_output import write_records
from shared.errors import ConfigError, DataError, ExpertsError, StoreError
from shared.pictures import PIXELS_VERSION
from shared.text_encoders import read_text_facts
from shared.vae import read_vae_facts


def expected_of(vae_digest: str, text_digests: Any) -> Header:
    """What a worker must agree on with the machine that asks it, or its records would not be those of their keys."""
    return {"vae": vae_digest, "text": dict(text_digests), "keys": KEY_FORMAT, "pixels": PIXELS_VERSION}


@dataclass(frozen=True)
class _Cut:
    picture: SentPicture
    crop: Crop
    thumbnail: Thumbnail


class Worker:
    """Loads each model once, and encodes one batch at a time; two chunks at once, so that one is decoded meanwhile."""

    def __init__(self, told: bytes) -> None:
        self._told, _ = unpack(told)
        self._encoder = SampleEncoder(
            Path(self._told["model"]),
            self._told["device"],
            self._told["dtype"],
            self._told["latents"],
            self._told["chunks"],
        )
        self._encoding = threading.Lock()
        self._trees = Trees()

    @cached_property
    def _to(self) -> Place | None:
        return open_place(self._told["to"]) if self._told["to"] else None

    def check(self) -> bytes:
        """Say whether this machine has the weights and the program that the keys name, and sees what it writes to."""
        return _answered(self._check)

    def work(self, message: bytes) -> bytes:
        """Do one job."""
        return _answered(lambda: self._work(*unpack(message)))

    def _check(self) -> bytes:
        model = self._encoder.model
        if not model.is_dir():
            raise ConfigError(f"there is no model folder {model}; every machine of the cluster needs it at that path")
        expected = self._told["expects"]
        here = expected_of(read_vae_facts(model).digest, read_text_facts(model).digests)
        if here["keys"] != expected["keys"] or here["pixels"] != expected["pixels"]:
            raise ConfigError("another version of this program; install the same one on every machine of the cluster")
        if here != expected:
            raise ConfigError(f"{model} holds other weights than here; every machine of the cluster needs the same")
        if self._to is not None:
            self._to.kind("")
        return pack({})

    def _work(self, header: Header, blobs: list[bytearray]) -> bytes:
        if "captions" in header:
            with self._encoding:
                records = self._encoder.encode_captions(header["captions"], header["keys"])
            answer: Header = {}
            if self._to is not None:
                answer["shard"] = write_records(self._to, records).model_dump()
                records = records[1::2]  # facts, which both need
            return pack(answer | {"keys": [key for key, _ in records]}, [frame for _, frame in records])
        return self._encode_pictures(sent_pictures(header, blobs, self._trees), header["rules"])

    def _encode_pictures(self, pictures: list[SentPicture], rules: Header) -> bytes:
        answer: Header = {"made": [], "lost": [], "unread": []}
        made: list[Framed] = []
        facts: dict[bytes, bytes] = {}
        pool = ThreadPoolExecutor(self._told["threads"], "decode")
        try:
            crops = _cut_all(pool, pictures, self._told["threads"] + rules["batch"], answer)
            for batch in same_size_batches(crops, rules["batch"]):
                with self._encoding:
                    records = self._encoder.encode_crops([each.crop for each in batch])
                for each, record in zip(batch, records, strict=True):
                    answer["made"].append([each.picture.index, each.crop.key, each.thumbnail, record is not None])
                    if record is not None:
                        made.append(record)
                        sample = each.picture.sample
                        facts |= [facts_record(each.picture.facts_key, sample.original_hw, each.thumbnail)]
        finally:
            pool.shutdown(cancel_futures=True)
        if self._to is None:
            return pack(answer, [frame for _, frame in made])
        if made:
            answer["shard"] = write_records(self._to, [*made, *facts.items()]).model_dump()
        return pack(answer)


def _cut_all(pool: ThreadPoolExecutor, pictures: list[SentPicture], ahead: int, answer: Header) -> Iterator[_Cut]:
    for picture, cuts in in_order(pool, _decoded, pictures, ahead):
        if isinstance(cuts, _Unread):
            answer["unread"].append([picture.index, str(cuts)])
        elif isinstance(cuts, DataError):
            answer["lost"].append([picture.index, str(cuts)])
        else:
            yield from cuts


class _Unread(Exception):
    """This machine cannot read it; the one that asks may."""


def _decoded(picture: SentPicture) -> list[_Cut] | DataError | _Unread:
    sample = picture.sample
    try:
        data = read_sample(sample)
    except (DataError, StoreError, ConfigError, OSError) as error:
        return DataError(str(error)) if picture.is_sent else _Unread(str(error))
    try:
        decoded = decode_sample(sample, data)
    except DataError as error:
        return error
    thumbnail = decoded.thumbnail().tobytes()
    return [_Cut(picture, crop, thumbnail) for crop in cut(decoded, picture.crops, sample.rules)]


def _answered(work: Callable[[], bytes]) -> bytes:
    """What `work` gives, or the error that a user may meet, with the name of this machine: an answer like any other."""
    try:
        return work()
    except ExpertsError as error:
        return pack({"error": known_class(error), "message": f"Ray worker on {platform.node()}: {error}"})
