"""Content keys: what a record depends on, and nothing else. Never a path, a time or a position in a list.

A changed byte of picture, caption, weights or pixel rule changes just the keys that depend on it.
"""

import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import Any

import msgpack

from cache_builder.buckets import CropPlan
from shared.pictures import PIXELS_VERSION, PixelRules

KEY_FORMAT = 1
STORED_DTYPE = "float16"
KeyOf = Callable[[bytes], bytes]
_packers = threading.local()  # a packer is for one thread, and a new one for each key costs more than the packing


def image_digest(data: bytes) -> bytes:
    """blake2b-256 of the bytes of a picture file."""
    return hashlib.blake2b(data, digest_size=32).digest()


def facts_key(digest: bytes, rules: PixelRules) -> bytes:
    """Key of what is known of a picture before it is cropped: its size and its thumbnail."""
    return facts_keys_under(rules)(digest)


def facts_keys_under(rules: PixelRules) -> KeyOf:
    """facts_key of each picture's digest under the same rules."""
    return _keys("facts", PIXELS_VERSION, after=(astuple(rules),))


def latent_key(
    digest: bytes, plan: CropPlan, rules: PixelRules, vae_digest: str, encode_dtype: str, latents: str
) -> bytes:
    """Key of the latents of one crop of a picture."""
    return latent_keys_of(plan, rules, vae_digest, encode_dtype, latents)(digest)


def latent_keys_of(plan: CropPlan, rules: PixelRules, vae_digest: str, encode_dtype: str, latents: str) -> KeyOf:
    """latent_key of each picture's digest where all are cut alike."""
    cut = (plan.resize_hw, plan.box_top, plan.box_left, plan.target_hw, plan.flip)
    after = (cut, PIXELS_VERSION, astuple(rules), vae_digest, encode_dtype, STORED_DTYPE, latents)
    return _keys("latents", after=after)


def text_key(caption: str, chunks: int, text_digests: Mapping[str, str]) -> bytes:
    """Key of the embeds of one caption."""
    return text_keys_for(chunks, text_digests)(caption.encode())


def text_keys_for(chunks: int, text_digests: Mapping[str, str]) -> KeyOf:
    """text_key of each caption's UTF-8 for the same text encoders."""
    return _keys("text", after=(chunks, sorted(text_digests.items()), "float32", STORED_DTYPE))


def text_facts_key(key: bytes) -> bytes:
    """Key of what is known of a caption's tokens, small enough to be read at every build; `key` is its text key."""
    return _text_facts_key(key)


def sample_id(dataset: str, digest: bytes) -> bytes:
    """Identity of a picture within a data set."""
    return sample_ids_in(dataset)(digest)


def sample_ids_in(dataset: str) -> KeyOf:
    """sample_id of each picture's digest within one data set."""
    return _keys("sample", dataset)


def crop_draw(seed: int, digest: bytes, variant: int) -> tuple[float, float]:
    """Two uniform draws in [0, 1) that place a random crop of a picture."""
    return _two_draws(_key("crop", seed, digest, variant))


def tag_draw(seed: int, digest: bytes, caption: str, variant: int, tag: int) -> tuple[float, float]:
    """Two uniform draws in [0, 1): where tag number `tag` of a picture's caption goes, and whether it is left out."""
    return _two_draws(_key("tag", seed, digest, caption.encode(), variant, tag))


def _two_draws(bits: bytes) -> tuple[float, float]:
    return int.from_bytes(bits[:6], "big") / 2**48, int.from_bytes(bits[6:12], "big") / 2**48


def subset_rank(seed: int, digest: bytes) -> bytes:
    """What pictures are ordered by where only some are taken: the same ones whatever the order they come in."""
    return _key("subset", seed, digest)


def _pack(fields: Any) -> bytes:
    packer = getattr(_packers, "packer", None)
    if packer is None:
        packer = _packers.packer = msgpack.Packer(use_bin_type=True)
    return bytes(packer.pack(fields))


def _key(*fields: Any) -> bytes:
    return hashlib.blake2b(_pack((KEY_FORMAT, *fields)), digest_size=16).digest()


def _keys(*before: Any, after: tuple[Any, ...] = ()) -> KeyOf:
    """_key(*before, data, *after) of each `data`: an array is packed field by field, so the others are packed once."""
    whole = (KEY_FORMAT, *before, b"", *after)
    head = msgpack.Packer().pack_array_header(len(whole)) + b"".join(map(_pack, whole[: 1 + len(before)]))
    tail, blake2b = b"".join(map(_pack, after)), hashlib.blake2b

    def key(data: bytes) -> bytes:
        length = len(data)
        size = b"\xc4" + length.to_bytes(1, "big") if length < 256 else _pack(data)[:-length]
        return blake2b(b"".join((head, size, data, tail)), digest_size=16).digest()

    return key


_text_facts_key = _keys("text facts")
