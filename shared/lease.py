"""One process at a time: an flock on a file that names its holder; the kernel gives it back however that one dies."""

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path

from shared.errors import StoreLocked

POLL_S = 0.2


class Lease:
    """Held from construction until `release`; a forked child shares it until it calls `release`."""

    def __init__(self, path: Path, what: str, way_out: str, *, wait: bool = False) -> None:
        """Raises StoreLocked "`what` by pid ...; `way_out`" while another process holds it, unless `wait`."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        while not self._try():
            if not wait:
                holder = os.pread(self._fd, 4096, 0).decode(errors="replace").strip()
                os.close(self._fd)
                raise StoreLocked(f"{what} by {holder or 'another process'}; {way_out}")
            time.sleep(POLL_S)
        with contextlib.suppress(OSError):  # on a full disk the lease holds all the same, though it names nobody
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"pid {os.getpid()} on {socket.gethostname()} since {time.ctime()}\n".encode(), 0)

    def release(self) -> None:
        """Give the lease back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _try(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def holder(path: Path) -> str | None:
    """Who holds the lease at `path` just now, in its own words; None where nobody does. Takes and writes nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back at once, by close
    except BlockingIOError:
        return os.pread(descriptor, 4096, 0).decode(errors="replace").strip() or "another process"
    else:
        return None
    finally:
        os.close(descriptor)


def listed_holder(path: Path) -> str | None:
    """The same as the kernel lists it: no lock is tried, so that a reader that hangs here keeps nobody out.

    Where the kernel lists no locks, whoever the file names and is alive; where it does not list those of another PID
    namespace, None.
    """
    import psutil

    try:
        if not path.is_file():  # a pipe would be waited for, for ever
            return None
        said, inode = path.read_text(errors="replace").strip(), path.stat().st_ino
    except OSError:
        return None
    try:
        table = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        pid = said.split()[1] if said.startswith("pid ") else ""
        return said if pid.isdigit() and psutil.pid_exists(int(pid)) else None
    held = any("FLOCK" in row and "WRITE" in row and row[-3].endswith(f":{inode}") for row in table)
    return (said or "another process") if held else None
