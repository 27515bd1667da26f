"""A child that reads a store leaves no trace of itself, also when its parent is killed."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache_builder.in_child import require_readable
from shared.errors import StoreLocked
from shared.store import StoreWriter

SLOW_S = 20.0


class SlowWriter(StoreWriter):
    """Takes long to list its keys, and says when it has begun."""

    def sizes(self) -> Iterator[list[tuple[bytes, int]]]:
        (self.path / "begun").write_text(str(os.getpid()))
        time.sleep(SLOW_S)
        return super().sizes()


def test_a_killed_writer_gives_its_lease_back_though_its_child_still_reads(tmp_path: Path) -> None:
    StoreWriter(tmp_path / "store").close()
    pid = os.fork()
    if pid == 0:
        try:
            require_readable(SlowWriter(tmp_path / "store"))
        finally:
            os._exit(1)
    begun = tmp_path / "store/begun"
    while not (begun.exists() and begun.read_text()):
        time.sleep(0.01)
    try:
        with pytest.raises(StoreLocked):
            StoreWriter(tmp_path / "store")  # the parent holds it all the while
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        StoreWriter(tmp_path / "store").close()
    finally:
        os.kill(int(begun.read_text()), signal.SIGKILL)
