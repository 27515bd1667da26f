"""The experts that train: each run folder as one answer, and all of them on the same axes.

RUN/config.toml, expert.json, run.lock, events.jsonl -> WatchedRun -> /api/runs
"""

import json
import os
import stat
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dashboard.folders import folder_id
from dashboard.history import History
from dashboard.sayings import ALARMS, QUIET, say_event
from dashboard.tail import Event, Tail, number
from shared.lease import listed_holder

CARD, CONFIG = "expert.json", "config.toml"
MOST_CARD_BYTES = 1 << 20
POINTS_A_SECOND = 10_000  # curves of a long run are worked out less often: of 100,000 points every ten seconds
Json = dict[str, Any]


class WatchedRun:
    """One run folder, read as it grows."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.id = folder, folder_id(folder)
        self._tail, self.history = Tail(folder / "events.jsonl"), History()
        self._reading = threading.Lock()
        self._drawn: tuple[int, float, Json] = (-1, -1e9, {})  # events that were read, when, what they come to
        self._read = 0

    def read(self, until_s: float) -> bool:
        """Take in events until time.monotonic() is `until_s`; returns whether all that are there were read."""
        with self._reading:
            if self._tail.was_replaced():
                self.history = History()
            while events := self._tail.read():
                for event in events:
                    self.history.add(event)
                self._read += len(events)
                if time.monotonic() > until_s:
                    break
            return self._tail.is_at_end()

    def told(self) -> list[Json]:
        """What happened in it that is worth telling, oldest first."""
        with self._reading:
            events = [event for event in self.history.told if event["event"] not in QUIET]
        name = self._card().get("name") or self.folder.name
        return [told(event, str(name)) for event in events]

    def as_json(self) -> Json:
        """Everything that the page says of it."""
        card, config = self._card(), self._config()
        damaged = [
            name for name, found in ((CARD, card), (CONFIG, config)) if not found and os.path.isfile(self.folder / name)
        ]
        with self._reading:
            history = self.history
            drawn = self._curves()
            step, speed, latest = history.step(), history.steps_per_s(), history.latest
            ended, has_begun = history.ended, bool(history.told) or history.points > 0
            share, is_read = self._tail.share, self._tail.is_at_end()
        steps = number(config.get("steps"))
        is_held = listed_holder(self.folder / "run.lock") is not None
        state = _state(is_held, ended, has_begun, step) if is_held or is_read else "reading"
        left = max(0.0, steps - step) / speed if steps and speed and state == "training" else None
        values = {name: number(latest.get(name)) for name in ("loss", "learning_rate", "data_wait_share", "skipped")}
        return {
            "id": self.id,
            "folder": self.folder.name,
            "name": str(card.get("name") or config.get("name") or self.folder.name),
            "low": _whole(card.get("low"), _range(config, "low")),
            "high": _whole(card.get("high"), _range(config, "high")),
            "manifest": _manifest(card),
            "why": f"{' and '.join(damaged)} cannot be read" if damaged else None,
            "state": state,
            "step": step,
            "steps": None if steps is None else int(steps),
            "steps_per_s": speed,
            "left_s": left,
            "read_share": share,
            **values,
            **drawn,
        }

    def _curves(self) -> Json:
        history, now_s = self.history, time.monotonic()
        is_due = now_s - self._drawn[1] >= history.points / POINTS_A_SECOND
        if self._drawn[0] != self._read and (is_due or not self._tail.is_at_end()):
            curves: Json = {"curves": history.curves(), "evals": history.evals()}
            curves |= {"bins": history.bins(), "eval_bins": history.eval_bins()}
            self._drawn = (self._read, now_s, curves)
        return self._drawn[2]

    def _card(self) -> Json:
        """The facts in expert.json; {} where there are none yet."""
        facts = read_table(self.folder / CARD, json.loads).get("facts", {})
        return facts if isinstance(facts, dict) else {}

    def _config(self) -> Json:
        return read_table(self.folder / CONFIG, tomllib.loads)


def read_table(path: Path, parse: Callable[[str], Any], most_bytes: int = MOST_CARD_BYTES) -> Json:
    """What a small file holds; {} where it is absent, too large, damaged or no table: the page then says less."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > most_bytes:  # a pipe would be waited for, for ever
            return {}
        table = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}


def told(event: Event, who: str) -> Json:
    """One event as the page shows it."""
    kind, time_s = event["event"], number(event.get("time_s")) or 0.0
    return {"time_s": time_s, "who": who, "event": kind, "text": say_event(event), "is_alarm": kind in ALARMS}


def _state(is_held: bool, ended: str, has_begun: bool, step: int) -> str:
    if is_held:
        return "training" if step else "starting"
    if ended:
        return {"complete": "finished", "stopped": "stopped"}[ended]
    return "interrupted" if has_begun else "not started"


def _range(config: Json, end: str) -> Any:
    timesteps = config.get("timesteps")
    return timesteps.get(end) if isinstance(timesteps, dict) else None


def _whole(*values: Any) -> int | None:
    return next((int(value) for each in values if (value := number(each)) is not None), None)


def _manifest(card: Json) -> Json | None:
    uses = card.get("manifests")
    use = uses[-1] if isinstance(uses, list) and uses else None
    if not isinstance(use, dict):
        return None
    return {"name": str(use.get("name", "")), "digest": str(use.get("digest", ""))}
