"""Records that `cache-store verify --quarantine` took out, until a build has encoded them anew.

STORE/quarantine/log.jsonl -> SetAside -> store_view.py
"""

from pathlib import Path
from typing import Any

from dashboard.tail import Tail
from shared.record import KEY_BYTES
from shared.store import StoreReader

MOST = 1000
"""That many of the newest are remembered."""


class SetAside:
    """The log of one store, read as it grows."""

    def __init__(self, store: Path) -> None:
        self._tail = Tail(store / "quarantine" / "log.jsonl")
        self._found: dict[bytes, str] = {}  # key -> why, newest last

    def still_lacking(self, reader: StoreReader | None) -> list[dict[str, Any]]:
        """{"path", "reason"} of those that the store lacks just now, or of all where it cannot be read."""
        if self._tail.was_replaced():
            self._found = {}
        while events := self._tail.read():
            for event in events:
                self._take(str(event.get("key", "")), str(event.get("why", "")))
        keys = list(self._found)
        if reader is not None and keys:
            with reader.snapshot() as snapshot:
                keys = [key for key, has in zip(keys, snapshot.has_each(keys), strict=True) if not has]
        return [{"path": f"record {key.hex()}", "reason": self._found[key]} for key in keys]

    def _take(self, key_hex: str, why: str) -> None:
        try:
            key = bytes.fromhex(key_hex)
        except ValueError:
            return
        if len(key) == KEY_BYTES:
            self._found.pop(key, None)
            self._found[key] = why
        while len(self._found) > MOST:
            del self._found[next(iter(self._found))]
