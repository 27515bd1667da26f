"""What the service beside us says of itself: STORE/service/status.json and events.jsonl. Without one the page says so.

It is alive if its process is, or if it has written within ALIVE_S: across PID namespaces its process cannot be seen.
"""

import json
import os
import socket
import time
from collections import deque
from pathlib import Path
from typing import Any

import psutil

from dashboard.runs import read_table, told
from dashboard.tail import Event, Tail, number
from shared.atomic import write_atomically

FOLDER = "service"
ALIVE_S = 10.0  # a status is written every 2 s at least
SILENT_S = 30.0  # one that lives and has written nothing for so long hangs, or its disk does
MOST_STATUS_BYTES = 4 << 20
KEPT_EVENTS = 200
MOST_ASIDE = 200

Json = dict[str, Any]


class Service:
    """The service's folder in a store."""

    def __init__(self, store: Path) -> None:
        self._folder = store / FOLDER
        self._tail = Tail(self._folder / "events.jsonl")
        self._events: deque[Event] = deque(maxlen=KEPT_EVENTS)

    def told(self) -> list[Json]:
        """What happened in it, oldest first."""
        if self._tail.was_replaced():
            self._events.clear()
        while events := self._tail.read():
            self._events.extend(events)
        return [told(event, "service") for event in self._events]

    def as_json(self) -> Json | None:
        """What it says, checked for types; None where there never was one."""
        said = read_table(self._folder / "status.json", json.loads, MOST_STATUS_BYTES)
        if said.get("version") != 1:
            return None
        seal = said.get("last_seal")
        return {
            "is_alive": _is_alive(said),
            "is_silent": time.time() - (number(said.get("beat_s")) or 0.0) > SILENT_S,
            "state": str(said.get("state", "")),
            "phase": None if said.get("phase") is None else str(said["phase"]),
            "manifest": str(said.get("manifest", "")),
            "folders": _texts(said.get("folders")),
            "last_error": None if said.get("last_error") is None else str(said["last_error"]),
            "quarantine": _aside(said.get("quarantine")),
            "kept": _texts(said.get("kept")),
            "last_seal": {"digest": str(seal.get("digest", "")), "time_s": number(seal.get("time_s"))}
            if isinstance(seal, dict)
            else None,
            **{name: number(said.get(name)) for name in ("done", "total", "images_per_s", "changed", "builds")},
            **{name: number(said.get(name)) for name in ("quarantined", "started_s", "beat_s")},
        }

    def roots(self) -> list[Path]:
        """Folders that the service builds from: pictures are looked for below them."""
        said = self.as_json()
        return [Path(folder) for folder in said["folders"]] if said else []


def announce(store: Path, host: str, port: int) -> Path | None:
    """Write STORE/service/page.json, by which a service that was started anew knows this page; where it can be.

    A store that is not there is not made by its reader.
    """
    folder = store / FOLDER
    if not ((store / "store.json").exists() or folder.is_dir()):
        return None
    created_s = psutil.Process().create_time()
    card = {"pid": os.getpid(), "host": host, "port": port, "created_s": created_s}
    try:
        folder.mkdir(exist_ok=True)
        write_atomically(folder / "page.json", json.dumps(card).encode() + b"\n")
    except OSError:
        return None  # a store that we may only read is shown all the same
    return folder / "page.json"


def withdraw(card: Path) -> None:
    """Remove page.json, unless it is another page's by now."""
    if read_table(card, json.loads).get("pid") == os.getpid():
        card.unlink(missing_ok=True)


def _is_alive(said: Json) -> bool:
    beat_s, pid = number(said.get("beat_s")) or 0.0, said.get("pid")
    if said.get("state") == "stopped":
        return False
    if time.time() - beat_s < ALIVE_S:
        return True
    is_here = said.get("host") == socket.gethostname()
    return is_here and isinstance(pid, int) and pid > 0 and psutil.pid_exists(pid)


def _texts(values: Any) -> list[str]:
    return [str(value) for value in values] if isinstance(values, list) else []


def _aside(rows: Any) -> list[Json]:
    found = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return [{"path": str(row.get("path", "")), "reason": str(row.get("reason", ""))} for row in found[:MOST_ASIDE]]
