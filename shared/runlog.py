"""events.jsonl: what happened in a run, one JSON object a line, append-only, readable while it grows."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.progress import say


class RunLog:
    """Appends events to `path`; a line is written whole or, after a kill, cut short and skipped by readers."""

    def __init__(self, path: Path) -> None:
        needs_newline = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
        # A file name that is not UTF-8 holds lone surrogates; written as \udcff they are JSON again.
        self._has_failed = False
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")
        if needs_newline:  # a line torn by a kill must not swallow the first one of this process
            self._file.write("\n")

    def write(self, event: str, **fields: Any) -> None:
        """Append {"time_s", "event", **fields}; numbers that are not finite become null."""
        line = {"time_s": round(time.time(), 3), "event": event, **fields}
        text = json.dumps(_finite(line), ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n"
        try:
            self._file.write(text)
            self._file.flush()  # what a full disk does not take stays in the buffer, for the next event to try again
        except OSError as error:
            if not self._has_failed:
                say(f"WARNING: events are not written just now: {error}")
            self._has_failed = True

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self._file.close()


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Events of a run in order; a torn line is passed over."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(event, dict):
                yield event


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not (-float("inf") < value < float("inf")):
        return None
    return value
