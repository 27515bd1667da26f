"""Records that are a function of their number, and children that check them: whoever reads one knows what it holds.

Kept free of torch, so that a fork costs a millisecond.
"""

import functools
import hashlib
import os
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from shared.errors import StoreError
from shared.record import encode_record
from shared.snapshot import Snapshot
from shared.store import StoreReader

RIGHT, REFUSED, SILENT, TRACEBACK = 0, 1, 2, 3


def key_of(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


@functools.lru_cache(200)
def tensor_of(number: int, most_bytes: int) -> np.ndarray:
    source = random.Random(number)
    return np.frombuffer(source.randbytes(source.randint(1, most_bytes)), np.uint8)


def record_of(number: int, most_bytes: int) -> tuple[bytes, bytes]:
    key = key_of(number)
    return key, encode_record(key, "test", {"t": tensor_of(number, most_bytes)}, {"number": number})


def is_right(snapshot: Snapshot, number: int, most_bytes: int) -> bool:
    expected = tensor_of(number, most_bytes)
    target = np.empty_like(expected)
    meta = snapshot.copy_into(key_of(number), {"t": target})
    copy = snapshot.read(key_of(number))
    return (
        meta == copy.meta == {"number": number}
        and np.array_equal(target, expected)
        and np.array_equal(copy.tensors["t"], expected)
    )


def forked(work: Callable[[], int]) -> int:
    """Run `work` in a child; its pid."""
    pid = os.fork()
    if pid == 0:
        code = TRACEBACK
        try:
            code = work()
        except BaseException:  # noqa: BLE001 - told, and then the child ends whatever it was
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    return pid


def status_of(pid: int) -> int:
    """Exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(work: Callable[[], int]) -> int:
    return status_of(forked(work))


def check_all(store: Path, numbers: Sequence[int], most_bytes: int) -> int:
    """Read every record, as a fresh process would."""
    try:
        with StoreReader(store) as reader, reader.snapshot() as snapshot:
            return RIGHT if all(is_right(snapshot, number, most_bytes) for number in numbers) else SILENT
    except StoreError:
        return REFUSED
