"""Keys of records in arrays: a million of them are 16 MB, and one lookup for each is all that they cost.

samples.py and named.py hold them -> todo.py, gc.py, verify.py ask which the store has, and which are among others
"""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np

from shared.record import KEY_BYTES
from shared.store import Store

KEYS_AT_ONCE = 4096  # looked up in one read transaction

# S16: numpy sorts it as LMDB does, byte by byte; of a key that ends in zeros it gives a shorter `bytes` (see `each`).
Kind = TypeVar("Kind", bound="np.dtype[Any]")
KEY_DTYPE = f"S{KEY_BYTES}"
Keys = np.ndarray[Any, np.dtype[np.bytes_]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]
Indices = np.ndarray[Any, np.dtype[np.int64]]


def as_keys(keys: Iterable[bytes]) -> Keys:
    """Keys of 16 bytes as an array; they are never all there as objects."""
    data = bytearray()
    for key in keys:
        data += key
    return np.frombuffer(data, KEY_DTYPE) if data else np.zeros(0, KEY_DTYPE)


def each(keys: Keys) -> Iterator[bytes]:
    """The keys as `bytes`, each of 16."""
    return (key.ljust(KEY_BYTES, b"\0") for some in parts(keys) for key in some.tolist())


def is_in(keys: Keys, known: Keys) -> Flags:
    """For each of `keys`, whether it is among `known`, which is sorted."""
    if not len(known):
        return np.zeros(len(keys), bool)
    places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.asarray(known[places] == keys)


def parts(array: np.ndarray[Any, Kind], size: int = KEYS_AT_ONCE) -> Iterator[np.ndarray[Any, Kind]]:
    """`array` in order, at most `size` of it at once."""
    return (array[start : start + size] for start in range(0, len(array), size))


def first_of_each(keys: Keys) -> Indices:
    """Where each of `keys` stands first, ascending."""
    order = np.argsort(np.ascontiguousarray(keys), kind="stable")
    first: Indices = order[begins_another(keys, order)]
    first.sort()
    return first


def begins_another(keys: Keys, order: np.ndarray[Any, np.dtype[Any]]) -> Flags:
    """For each place in `order`, whether the key there is another than the one before it; the keys are never copied."""
    is_another = np.ones(len(order), bool)
    for start in range(1, len(order), KEYS_AT_ONCE):
        stretch = keys[order[start - 1 : start + KEYS_AT_ONCE]]
        is_another[start : start + KEYS_AT_ONCE] = stretch[1:] != stretch[:-1]
    return is_another


def stored(store: Store, keys: Keys) -> Flags:
    """Of which of `keys` the store has a record."""
    found, order = np.zeros(len(keys), bool), np.argsort(np.ascontiguousarray(keys))
    for some in parts(order):
        with store.snapshot() as snapshot:
            found[some] = snapshot.has_each(each(keys[some]))
    return found
