"""Memory of this process that is its own and not a file's, looked at while something runs."""

import threading
from pathlib import Path

WATCH_S = 0.02


def own_bytes() -> int:
    """What the kernel could not take back: mapped files, which it reads again at need, do not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "VmSwap:")))


class Watch(threading.Thread):
    """Looks at it every now and then."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._most, self._ended = own_bytes(), threading.Event()
        self.start()

    def run(self) -> None:
        while not self._ended.wait(WATCH_S):
            self._most = max(self._most, own_bytes())

    def stop(self) -> int:
        """The most that was seen, bytes."""
        self._ended.set()
        self.join()
        return max(self._most, own_bytes())
