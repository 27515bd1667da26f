"""Memory that nobody uses goes back to the system."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shared.device import free_unused_memory
from shared.kept_memory import keep_freed_memory

BLOCK = 1 << 20


def own_bytes() -> int:
    """Memory of this process alone that is not a file's."""
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="Linux tells it"),
    pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc alone keeps it"),
]


def test_freed_weights_are_given_back() -> None:
    keep_freed_memory()  # as any process that writes a store
    blocks = [torch.ones(BLOCK, dtype=torch.uint8) for _ in range(200)]
    del blocks[:-1]  # what is left lies above them, so glibc cannot shrink its heap
    before = own_bytes()
    free_unused_memory()
    assert before - own_bytes() > 100 * BLOCK
    assert int(blocks[0].sum()) == BLOCK


def test_what_lies_apart_goes_by_itself() -> None:
    """In a process of its own, whose heap has no room from before; what comes after the block is kept, for the next."""
    script = """
from pathlib import Path
import numpy as np
from shared.kept_memory import apart

def own_mib():
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) // 256

def freed_mib(count):
    blocks = [np.ones(1 << 20, np.uint8) for _ in range(count)]
    before = own_mib()
    del blocks[:-1]
    return before - own_mib()

np.ones(8 << 20, np.uint8)  # freed at once, so that glibc by itself would keep what is smaller
with apart():
    print(freed_mib(200))
print(freed_mib(100))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lying_apart, behind_it = map(int, done.stdout.split())
    assert lying_apart > 190
    assert behind_it < 20
