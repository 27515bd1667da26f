"""Every random draw is a function of (seed, what, where): no global state, nothing to save, nothing to restore."""

import hashlib
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *labels: str | int | bytes) -> int:
    """63 bits that depend on `seed` and on every label, in order (blake2b over their canonical msgpack)."""
    message = msgpack.packb([seed, *labels], use_bin_type=True)
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "big") >> 1


def make_generator(seed: int, *labels: str | int | bytes, device: "torch.device | str" = "cpu") -> "torch.Generator":
    """A torch generator for one purpose at one place.

    CPU generators keep the lower 32 bits of a seed (CUDA's keep all): of a million samples some hundred pairs share
    their noise once in a run, which no training notices.
    """
    import torch  # here: who only derives seeds needs none of it

    return torch.Generator(device=device).manual_seed(derive_seed(seed, *labels))


def make_permutation(seed: int, *labels: str | int | bytes, length: int) -> np.ndarray[Any, np.dtype[Any]]:
    """A permutation of range(length), for one purpose at one place; int32 while that is enough."""
    order = np.arange(length, dtype=np.int32 if length < 1 << 31 else np.int64)
    np.random.Generator(np.random.Philox(key=derive_seed(seed, *labels))).shuffle(order)
    return order


def make_uniform(seed: int, *labels: str | int | bytes, length: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`length` numbers in [0, 1), float64, for one purpose at one place."""
    return np.random.Generator(np.random.Philox(key=derive_seed(seed, *labels))).random(length)
