"""The page as tests start it, and what they ask of it; the other commands beside it."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0


@contextmanager
def page(store: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A page's process, and its address."""
    command = [sys.executable, "-m", "dashboard", "--store", str(store), "--port", "0", *options]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        yield process, process.stderr.readline().strip().rpartition(" ")[2]
    finally:
        process.kill()
        process.communicate()


def answer_of(address: str) -> str:
    """What the page answers, as soon as it does."""
    until_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < until_s:
        with suppress(OSError), urlopen(address, timeout=PATIENCE_S) as answer:
            return answer.read().decode()
        time.sleep(0.02)
    raise AssertionError(f"no answer from {address}")


def command(module: str, function: str, *arguments: object) -> subprocess.Popen[bytes]:
    """One of the project's commands in a process of its own, on one thread, after everything else on the machine."""
    code = f"import torch; torch.set_num_threads(1); from {module} import {function}; {function}()"
    return subprocess.Popen(
        ["nice", "-n", "15", sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
