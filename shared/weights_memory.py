"""Digests of large weights, remembered between commands: hashing SDXL's gigabytes takes longer than reusing a store.

    $XDG_CACHE_HOME/sdxl-experts/weights.json    {what was asked and the state of each file: digest}

Disposable. A digest counts only while every file has the size, inode, mtime and ctime that it had when it was hashed,
and had been left alone for a while then: a file that is written again within the clock's grain looks unchanged.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from shared.atomic import write_atomically

REMEMBERED_FROM_BYTES = 64 << 20  # less is hashed in a blink
SETTLED_S = 2.0
MOST = 256  # digests kept


def remembered_digest(question: str, files: Sequence[Path], work_out: Callable[[], str]) -> str:
    """`work_out()`, the digest that `question` asks of `files`, or what it gave when they were as they are now."""
    before = [path.stat() for path in files]
    if sum(state.st_size for state in before) < REMEMBERED_FROM_BYTES:
        return work_out()
    key = _key(question, files, before)
    memory = _read()
    if key in memory:
        return memory[key]
    digest = work_out()
    settled = all(time.time() - max(state.st_mtime, state.st_ctime) > SETTLED_S for state in before)
    if settled and key == _key(question, files, [path.stat() for path in files]):
        _write(key, digest)
    return digest


def cache_folder() -> Path:
    """Where what can be made again lies for a user's commands; raises RuntimeError where there is no home."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "sdxl-experts"


def _key(question: str, files: Sequence[Path], states: Sequence[os.stat_result]) -> str:
    seen = [
        [str(path.resolve()), state.st_size, state.st_dev, state.st_ino, state.st_mtime_ns, state.st_ctime_ns]
        for path, state in zip(files, states, strict=True)
    ]
    return hashlib.blake2b(json.dumps([question, seen]).encode(), digest_size=16).hexdigest()


def _path() -> Path:
    return cache_folder() / "weights.json"


def _read() -> dict[str, str]:
    try:
        content = json.loads(_path().read_text())
    except (OSError, ValueError, RecursionError, RuntimeError):
        return {}
    is_whole = isinstance(content, dict) and all(isinstance(digest, str) for digest in content.values())
    return content if is_whole else {}


def _write(key: str, digest: str) -> None:
    """Two commands at once may lose one another's entry, which is then worked out again."""
    try:
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        memory = {**_read(), key: digest}
        write_atomically(path, json.dumps(dict(list(memory.items())[-MOST:]), indent=1).encode() + b"\n")
    except (OSError, RuntimeError):
        pass  # a home that cannot be written to costs the time, nothing else
