"""What has been read or written once, taken out of the page cache: it would push out what others read all the time."""

import os
from pathlib import Path


def drop_cached(path: Path, start: int, end: int) -> None:
    """Let bytes [start, end) of a file go from memory, so far as they are on the disk and nobody has them mapped.

    Advice alone: nothing happens where the system takes none.
    """
    if end <= start or not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
