"""A growing file of JSON lines, read from where the last look ended: a look costs what is new, never the whole file.

RUN/events.jsonl, STORE/service/events.jsonl -> Tail.read -> history.py, service.py
"""

import os
import stat
from pathlib import Path
from typing import Any

from pydantic_core import from_json

SLICE_BYTES = 1 << 18
LONGEST_LINE = 1 << 22  # what is longer is no event of ours

Event = dict[str, Any]


class Tail:
    """Where reading stands in one file, which another process appends to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size_bytes = 0
        self._inode, self._offset = -1, 0

    @property
    def share(self) -> float:
        """How much of the file is read, 0 to 1."""
        return self._offset / self.size_bytes if self.size_bytes else 1.0

    def was_replaced(self) -> bool:
        """Look at the file; True where it is another one or shorter than before, and reading begins anew."""
        try:
            found = os.stat(self.path)
        except OSError:
            found = None
        is_file = found is not None and stat.S_ISREG(found.st_mode)  # a pipe would be waited for, for ever
        inode, self.size_bytes = (found.st_ino, found.st_size) if found and is_file else (-1, 0)
        is_same = inode == self._inode and self.size_bytes >= self._offset
        if not is_same:
            self._inode, self._offset = inode, 0
        return not is_same

    def read(self) -> list[Event]:
        """The next events, at most a slice of them; [] at the end of what is whole. Torn lines are passed over."""
        if self._offset >= self.size_bytes:
            return []
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read(SLICE_BYTES)
                end = data.rfind(b"\n") + 1
                if not end and len(data) == SLICE_BYTES:
                    data += file.read(LONGEST_LINE)
                    end = data.rfind(b"\n") + 1 or len(data)
        except OSError:
            return []
        self._offset += end
        return [event for line in data[:end].splitlines() if (event := _event(line)) is not None] if end else []

    def is_at_end(self) -> bool:
        """Whether no whole slice is left to read."""
        return self.size_bytes - self._offset < SLICE_BYTES


def _event(line: bytes) -> Event | None:
    try:
        event = from_json(line, allow_inf_nan=False)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def number(value: Any) -> float | None:
    """`value` where it is a finite number, else None: events come from files."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 else None
