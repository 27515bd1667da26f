"""Is a manifest's file what was sealed: read from end to end in a thread, at some GB/s, while its reader goes on.

Read and not mapped, so that a file of gigabytes takes no memory of the process.
"""

import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import xxhash

READ_AT_ONCE = 4 << 20  # bytes


def start_check(file: int, seal: Mapping[str, Any]) -> "Future[bool]":
    """Whether the file of the descriptor has the length and the xxh3-128 of its seal, told once it is read.

    The descriptor may be closed meanwhile. The result raises OSError where the file cannot be read.
    """
    check: Future[bool] = Future()
    own = os.dup(file)  # and a lock on it goes on

    def run() -> None:
        try:
            check.set_result(_is_sound(own, seal))
        except OSError as error:
            check.set_exception(error)
        finally:
            os.close(own)

    threading.Thread(target=run, name="manifest check", daemon=True).start()
    return check


def _is_sound(file: int, seal: Mapping[str, Any]) -> bool:
    checksum, size, buffer = xxhash.xxh3_128(), 0, memoryview(bytearray(READ_AT_ONCE))
    while count := os.preadv(file, [buffer], size):
        checksum.update(buffer[:count])
        size += count
    return (size, checksum.hexdigest()) == (seal["bytes"], seal["xxh3_128"])
