"""A new file that goes to the disk past the page cache: what is read elsewhere need not stay in memory.

    pieces of any length -> one aligned buffer -> writes of whole blocks, O_DIRECT -> the file, cut to its length

The kernel copies nothing and finds no pages for it, which is most of what writing costs a processor, and what others
read often, such as a store that is being trained on, stays cached. File systems without O_DIRECT get plain writes.
"""

import errno
import fcntl
import mmap
import os
from pathlib import Path

BUFFER_BYTES = 4 << 20
BLOCK_BYTES = 4096  # what offsets, lengths and addresses of such writes are multiples of
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it


class DirectFile:
    """Written from its beginning to its end by one thread, as a Python file is; raises OSError as one does.

    Not durable before it is synced, and not whole before `finish`; `close` alone leaves it as it is.
    """

    def __init__(self, path: Path) -> None:
        self._fd = _open_direct(path)
        self._buffer = mmap.mmap(-1, BUFFER_BYTES)  # begins on a page
        self._view = memoryview(self._buffer)
        self._filled = self._written = 0  # bytes

    def write(self, data: bytes | memoryview) -> int:
        """Take all of `data`; returns its length, bytes."""
        rest = memoryview(data).cast("B")
        length = len(rest)
        while len(rest):
            count = min(len(rest), BUFFER_BYTES - self._filled)
            self._view[self._filled : self._filled + count] = rest[:count]
            self._filled += count
            rest = rest[count:]
            if self._filled == BUFFER_BYTES:
                self._empty(BUFFER_BYTES)
        return length

    def finish(self) -> None:
        """Write what is left."""
        length, padding = self.tell(), -self._filled % BLOCK_BYTES
        self._view[self._filled : self._filled + padding] = bytes(padding)
        self._empty(self._filled + padding)
        os.ftruncate(self._fd, length)

    def tell(self) -> int:
        """Bytes so far."""
        return self._written + self._filled

    def flush(self) -> None:
        """Nothing: blocks are written when they are whole."""

    @property
    def closed(self) -> bool:
        """Whether it takes no more."""
        return self._fd < 0

    def close(self) -> None:
        """Let go of the file and the buffer."""
        if not self.closed:
            os.close(self._fd)
            self._fd = -1
            self._view.release()
            self._buffer.close()

    def _empty(self, count: int) -> None:
        done = 0
        while done < count:
            try:
                done += os.pwrite(self._fd, self._view[done:count], self._written + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not _is_direct(self._fd):
                    raise
                _make_plain(self._fd)  # it took the flag, but not these blocks
            else:
                if done % BLOCK_BYTES:
                    _make_plain(self._fd)  # a disk that fills up, or a signal, cut a write short within a block
        self._written += min(count, self._filled)
        self._filled = 0


def _open_direct(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _is_direct(descriptor: int) -> bool:
    return bool(_DIRECT and fcntl.fcntl(descriptor, fcntl.F_GETFL) & _DIRECT)


def _make_plain(descriptor: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~_DIRECT)
