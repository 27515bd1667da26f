"""STORE/service/status.json: how the service is, for the page and for whoever else asks. Replaced whole, never half."""

import calendar
import json
import os
import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shared.atomic import write_atomically
from shared.progress import say

VERSION = 1
BEAT_S = 2.0  # written so often though nothing has changed
AT_MOST_EVERY_S = 0.2
LISTED = 200
RATE_OVER_S = 60.0
State = Literal["waiting", "quiet", "building", "stopped"]


@dataclass
class ServiceStatus:
    """What status.json says; `write` puts it there."""

    path: Path
    manifest: str
    folders: Sequence[str]
    started_s: float = field(default_factory=time.time)
    state: State = "waiting"
    phase: str | None = None
    """What a build does just now, or what a service that should build waits for."""
    done: int = 0
    total: int = 0
    images_per_s: float | None = None
    """Crops that are encoded, over the last minute of a build."""
    changed: int = 0
    builds: int = 0
    quarantined: int | None = None
    """None until a build of this service has looked at the pictures."""
    quarantine: Sequence[Mapping[str, str]] = ()
    last_seal: Mapping[str, Any] | None = None
    """{"digest", "time_s", "rows"} of the current manifest."""
    last_error: str | None = None
    kept: Sequence[str] = ()
    _pace: deque[tuple[float, int]] = field(default_factory=deque)
    _written: tuple[str, float] = ("", 0.0)
    _has_failed: bool = False

    def advance(self, task: str, done: int, total: int | None) -> None:
        """Note what a build has come to."""
        now_s = time.monotonic()
        if task != self.phase:
            self._pace.clear()
        self.phase, self.done, self.total = task, done, total or 0
        self._pace.append((now_s, done))
        while now_s - self._pace[0][0] > RATE_OVER_S and len(self._pace) > 2:
            self._pace.popleft()
        began_s, first = self._pace[0]
        moved = task == "pictures" and now_s > began_s
        self.images_per_s = round((done - first) / (now_s - began_s), 3) if moved else None

    def rest(self, state: State, phase: str | None = None) -> None:
        """No build is running."""
        self.state, self.phase, self.done, self.total, self.images_per_s = state, phase, 0, 0, None

    def take_quarantine(self, report: Mapping[str, Any]) -> None:
        """Note what a build could not use; a report of nothing seen says nothing of it."""
        if report.get("seen"):
            found = report["quarantined_files"]
            self.quarantined, self.quarantine = len(found), found[:LISTED]

    def write(self, *, at_once: bool = False) -> None:
        """Put it in place where something has changed, or the last time was a while ago."""
        now_s, said = time.monotonic(), json.dumps(self._as_json(), sort_keys=True)
        before, before_s = self._written
        if not at_once and now_s - before_s < (BEAT_S if said == before else AT_MOST_EVERY_S):
            return
        self._written = said, now_s
        try:
            write_atomically(
                self.path, json.dumps(self._as_json() | {"beat_s": time.time()}, indent=1).encode() + b"\n"
            )
            self._has_failed = False
        except OSError as error:  # a full disk must not end the service
            if not self._has_failed:
                say(f"WARNING: {self.path} is not written just now: {error}")
            self._has_failed = True

    def _as_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started_s": self.started_s,
            "state": self.state,
            "manifest": self.manifest,
            "folders": list(self.folders),
            "phase": self.phase,
            "done": self.done,
            "total": self.total,
            "images_per_s": self.images_per_s,
            "changed": self.changed,
            "builds": self.builds,
            "quarantined": self.quarantined,
            "quarantine": list(self.quarantine),
            "last_seal": self.last_seal,
            "last_error": self.last_error,
            "kept": list(self.kept),
        }


def read_last_seal(store: Path, manifest: str) -> dict[str, Any] | None:
    """{"digest", "time_s", "rows"} of the current manifest, as its seal says; None where there is none."""
    try:
        seal = json.loads((store / "manifests" / manifest / "current.json").read_text())
        sealed_s = calendar.timegm(time.strptime(seal["sealed_at"], "%Y-%m-%dT%H:%M:%SZ"))
        return {"digest": str(seal["digest"]), "time_s": float(sealed_s), "rows": int(seal["rows"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
