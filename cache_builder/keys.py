"""Content keys: what a record depends on, and nothing else. Never a path, a time or a position in a list.

A changed byte of picture, caption, weights or pixel rule changes just the keys that depend on it.
"""

import functools
import hashlib
import threading
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import msgpack

from cache_builder.buckets import CropPlan
from shared.pictures import PIXELS_VERSION, PixelRules

KEY_FORMAT = 1
STORED_DTYPE = "float16"
_packers = threading.local()  # a packer is for one thread, and a new one for each key costs more than the packing


def image_digest(data: bytes) -> bytes:
    """blake2b-256 of the bytes of a picture file."""
    return hashlib.blake2b(data, digest_size=32).digest()


def facts_key(digest: bytes, rules: PixelRules) -> bytes:
    """Key of what is known of a picture before it is cropped: its size and its thumbnail."""
    return _key("facts", PIXELS_VERSION, digest, _rules(rules))


def latent_key(
    digest: bytes, plan: CropPlan, rules: PixelRules, vae_digest: str, encode_dtype: str, latents: str
) -> bytes:
    """Key of the latents of one crop of a picture."""
    cut = (plan.resize_hw, plan.box_top, plan.box_left, plan.target_hw, plan.flip)
    fields = (digest, cut, PIXELS_VERSION, _rules(rules), vae_digest, encode_dtype, STORED_DTYPE, latents)
    return _key("latents", *fields)


def text_key(caption: str, chunks: int, text_digests: Mapping[str, str]) -> bytes:
    """Key of the embeds of one caption."""
    return _key("text", caption.encode(), chunks, sorted(text_digests.items()), "float32", STORED_DTYPE)


def text_facts_key(key: bytes) -> bytes:
    """Key of what is known of a caption's tokens, small enough to be read at every build; `key` is its text key."""
    return _key("text facts", key)


def sample_id(dataset: str, digest: bytes) -> bytes:
    """Identity of a picture within a data set."""
    return _key("sample", dataset, digest)


def crop_draw(seed: int, digest: bytes, variant: int) -> tuple[float, float]:
    """Two uniform draws in [0, 1) that place a random crop of a picture."""
    return _two_draws(_key("crop", seed, digest, variant))


def tag_draw(seed: int, digest: bytes, caption: str, variant: int, tag: int) -> tuple[float, float]:
    """Two uniform draws in [0, 1): where tag number `tag` of a picture's caption goes, and whether it is left out."""
    return _two_draws(_key("tag", seed, digest, caption.encode(), variant, tag))


@functools.lru_cache(maxsize=64)  # of millions of keys in a build, all but a few name the same rules
def _rules(rules: PixelRules) -> tuple[Any, ...]:
    return astuple(rules)


def _two_draws(bits: bytes) -> tuple[float, float]:
    return int.from_bytes(bits[:6], "big") / 2**48, int.from_bytes(bits[6:12], "big") / 2**48


def subset_rank(seed: int, digest: bytes) -> bytes:
    """What pictures are ordered by where only some are taken: the same ones whatever the order they come in."""
    return _key("subset", seed, digest)


def _pack(fields: tuple[Any, ...]) -> bytes:
    packer = getattr(_packers, "packer", None)
    if packer is None:
        packer = _packers.packer = msgpack.Packer(use_bin_type=True)
    return bytes(packer.pack(fields))


def _key(*fields: Any) -> bytes:
    return hashlib.blake2b(_pack((KEY_FORMAT, *fields)), digest_size=16).digest()
