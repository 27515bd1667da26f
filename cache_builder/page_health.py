"""Does the page still answer? Asked now and then over a socket that nobody waits on.

page_process.py looks -> PageHealth: GET /healthz -> any answer at all, or a miss
"""

import contextlib
import json
import select
import socket
from pathlib import Path

MISSES = 3
CONNECT_S = 0.5  # on this machine: at once, or nobody listens
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class PageHealth:
    """Of one process that serves; a new one for the next."""

    def __init__(self, card: Path, hung_s: float) -> None:
        """Of the page that says in `card` where it is, and that hangs if it answers nothing for `hung_s`, seconds."""
        self._card, self._between_s = card, hung_s / MISSES
        self._misses, self._next_s = 0, 0.0
        self._asked: socket.socket | None = None

    def is_hung(self, now_s: float) -> bool:
        """Whether as many questions in a row were not answered in time; asks the next one when that is due."""
        if self._asked is not None and select.select([self._asked], [], [], 0)[0]:
            self._misses = 0
            self.close()
        if now_s < self._next_s:
            return False
        if self._next_s:  # the first look begins the count
            self._misses += self._asked is not None
            self.close()
            self._misses += not self._ask()
        self._next_s = now_s + self._between_s
        return self._misses >= MISSES

    def close(self) -> None:
        """Wait for no answer."""
        if self._asked is not None:
            self._asked.close()
        self._asked = None

    def _ask(self) -> bool:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            said = json.loads(self._card.read_text())
            host = EVERYWHERE.get(said["host"], said["host"])
            self._asked = socket.create_connection((host, int(said["port"])), CONNECT_S)
            name = f"[{host}]" if ":" in host else host
            self._asked.sendall(f"GET /healthz HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())
        return self._asked is not None
