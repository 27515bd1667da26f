"""Is a manifest's file what was sealed: read from end to end in a thread, at some GB/s, while its reader goes on.

Read and not mapped, so that a file of gigabytes takes no memory of the process.
"""

import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import xxhash

from shared.errors import ManifestMismatch

READ_AT_ONCE = 4 << 20  # bytes
Check = Future[bool]


class ManifestAbsent(ManifestMismatch):
    """A manifest that is not there, or not whole; building it again helps."""


def start_check(file: int, seal: Mapping[str, Any]) -> Check:
    """Whether the file of the descriptor has the length and the xxh3-128 of its seal, told once it is read.

    The descriptor may be closed meanwhile. The result raises OSError where the file cannot be read.
    """
    check: Check = Future()
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


def require_sound(path: Path, check: Check) -> None:
    """Wait for a check of the manifest in `path`; raises ManifestMismatch where it is not what was sealed."""
    try:
        is_sound = check.result()
    except OSError as error:
        raise ManifestAbsent(f"manifest {path} cannot be read: {error}; build it again") from None
    if not is_sound:
        raise ManifestAbsent(f"manifest {path} is damaged (checksum); build it again")
