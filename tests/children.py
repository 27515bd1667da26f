"""Work in a fork of the test, which is killed or waited for."""

import os
import signal
from collections.abc import Callable


def in_a_child(work: Callable[[], object]) -> int:
    """Begin it; the child's pid."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def end(pid: int) -> None:
    """Kill it and wait until it is gone."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
