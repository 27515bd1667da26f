"""Which record goes into which shard: in the order of the samples that need it, cut by size; the same for a store that
has not changed, so that an export that was killed finds again what it wrote.

Records of one sample lie together, and samples lie in the order of their ids, so that a part of a manifest
(shared/parts.py) is read from few shards. A record that several samples need lies with the first of them. What no
manifest names comes last, by key.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cache_builder.key_arrays import Keys, as_keys, each, is_in
from cache_builder.keys import text_facts_key
from cache_builder.named import common_keys, picture_facts_keys, pixel_rules
from shared.errors import StoreFormat
from shared.manifest import Manifest
from shared.store import StoreReader

SHARD_BYTES = 256 << 20

_Sizes = np.ndarray[Any, np.dtype[np.int64]]
_Heads = np.ndarray[Any, np.dtype[np.uint32]]


@dataclass(frozen=True)
class Plan:
    """Keys in the order of their shards, the bytes of each record, and where each shard ends."""

    keys: Keys
    sizes: _Sizes
    ends: list[int]

    def shards(self) -> Iterator[tuple[list[bytes], list[int]]]:
        """Keys and sizes of each shard."""
        start = 0
        for end in self.ends:
            yield list(each(self.keys[start:end])), self.sizes[start:end].tolist()
            start = end


def plan_export(reader: StoreReader, manifests: Sequence[Manifest], *, named_only: bool, shard_bytes: int) -> Plan:
    """The shards of what `manifests` name and, unless `named_only`, of all the rest of the store.

    Raises StoreFormat where something that is needed is not in the store.
    """
    stored, sizes = _stored(reader)
    keys, heads = _places(manifests)
    there = is_in(keys, stored)
    _require(keys[~there], manifests)
    keys, heads = keys[there], heads[there]
    order = np.lexsort((keys, heads))
    named = keys[order]
    named_sizes = sizes[np.searchsorted(stored, named)]
    ends = _cut(named_sizes, shard_bytes)
    if named_only:
        return Plan(named, named_sizes, ends)
    rest = ~is_in(stored, keys)
    ends += [len(named) + end for end in _cut(sizes[rest], shard_bytes)]
    return Plan(np.concatenate([named, stored[rest]]), np.concatenate([named_sizes, sizes[rest]]), ends)


def _stored(reader: StoreReader) -> tuple[Keys, _Sizes]:
    pages = [
        (as_keys([key for key, _ in page]), np.array([size for _, size in page], np.int64)) for page in reader.sizes()
    ]
    if not pages:
        return as_keys([]), np.zeros(0, np.int64)
    return np.concatenate([keys for keys, _ in pages]), np.concatenate([sizes for _, sizes in pages])


def _places(manifests: Sequence[Manifest]) -> tuple[Keys, _Heads]:
    """Every record that manifests name, sorted by key, and the head of the first sample that needs it."""
    found = [_first(*_named(manifest)) for manifest in manifests]
    if not found:
        return as_keys([]), np.zeros(0, np.uint32)
    return _first(np.concatenate([keys for keys, _ in found]), np.concatenate([heads for _, heads in found]))


def _named(manifest: Manifest) -> tuple[Keys, _Heads]:
    heads, common = manifest.sample_heads(), common_keys(manifest)
    texts, text_heads = _first(
        np.concatenate([common, manifest.text_keys()]),
        np.concatenate([np.zeros(len(common), np.uint32), np.repeat(heads, manifest.caption_counts())]),
    )
    facts = as_keys([text_facts_key(key) for key in each(texts)])
    pictures = as_keys(list(picture_facts_keys(manifest, manifest.image_digests())))
    return (
        np.concatenate([manifest.latent_keys(), texts, facts, pictures]),
        np.concatenate(
            [
                np.repeat(heads, manifest.variant_counts()),
                text_heads,
                text_heads,
                np.tile(heads, len(pixel_rules(manifest))),
            ]
        ),
    )


def _first(keys: Keys, heads: _Heads) -> tuple[Keys, _Heads]:
    """Each key once, sorted, with the least of its heads."""
    order = np.lexsort((heads, keys))
    keys, heads = keys[order], heads[order]
    is_first = np.ones(len(keys), np.bool_)
    is_first[1:] = keys[1:] != keys[:-1]
    return keys[is_first], heads[is_first]


def _cut(sizes: _Sizes, shard_bytes: int) -> list[int]:
    """Where to end each shard, so that it is about `shard_bytes` long."""
    if not len(sizes):
        return []
    shard = (np.cumsum(sizes) - sizes) // shard_bytes
    return [*(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(sizes)]


def _require(absent: Keys, manifests: Sequence[Manifest]) -> None:
    """Facts may be missing, what trainers read may not."""
    for manifest in manifests:
        for named in (manifest.latent_keys(), manifest.text_keys(), common_keys(manifest)):
            if (missing := named[is_in(named, absent)]).size:
                raise StoreFormat(
                    f"record {next(each(missing)).hex()} of manifest {manifest.name!r} is not in the store: the same "
                    "cache-build makes it anew (cache-store verify lists what is missing)"
                )
