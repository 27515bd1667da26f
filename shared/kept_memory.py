"""What glibc does with memory that is freed: keeps it for the next who asks, or gives it back to the kernel.

LMDB allocates each record that is put, and frees it after the commit. glibc would unmap such blocks one by one, and the
kernel find and clear each of their pages anew, which takes a processor several times as long as copying the record.

Weights are below what glibc unmaps, most of them: once they are gone, their place is filled with parts of what comes
next and grows full of holes, 2 GB of them while a picture of 1024 px is decoded where a UNet has been.
"""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager

LARGEST_BLOCK_BYTES = 32 << 20  # the most that glibc takes, and where its own rule ends up
KEPT_BYTES = 128 << 20  # more than the records of one commit
APART_BYTES = 256 << 10  # less than nearly all weights of a model that is worth it
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


@functools.cache
def keep_freed_memory() -> None:
    """From now on this process reuses blocks of up to 32 MiB, and keeps up to 128 MiB of free memory for that.

    Nothing happens with other C libraries than glibc.
    """
    _set(_M_MMAP_THRESHOLD, LARGEST_BLOCK_BYTES)
    _set(_M_TRIM_THRESHOLD, KEPT_BYTES)


@contextmanager
def apart() -> Iterator[None]:
    """Give what is allocated in this block a place of its own, which the kernel has back as soon as it is freed.

    From then on the process keeps freed memory as after keep_freed_memory.
    """
    _set(_M_MMAP_THRESHOLD, APART_BYTES)
    try:
        yield
    finally:
        _set(_M_MMAP_THRESHOLD, LARGEST_BLOCK_BYTES)
        _set(_M_TRIM_THRESHOLD, KEPT_BYTES)


def _set(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)
