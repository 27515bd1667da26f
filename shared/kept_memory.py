"""Memory that is freed and asked for again a moment later: glibc is told not to give it back to the kernel in between.

LMDB allocates each record that is put, and frees it after the commit. glibc would unmap such blocks one by one, and the
kernel find and clear each of their pages anew, which takes a processor several times as long as copying the record.
"""

import ctypes
import functools

LARGEST_BLOCK_BYTES = 32 << 20  # the most that glibc takes, and where its own rule ends up
KEPT_BYTES = 128 << 20  # more than the records of one commit
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


@functools.cache
def keep_freed_memory() -> None:
    """From now on this process reuses blocks of up to 32 MiB, and keeps up to 128 MiB of free memory for that.

    Nothing happens with other C libraries than glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGEST_BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
