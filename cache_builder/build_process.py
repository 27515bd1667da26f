"""A build in a process of its own, as the service sees it: what it says, whether it still does, and how it ended.

serve.py -> BuildProcess -> build_job.py: a decoder that crashes, or memory that runs out, ends that process alone.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COMMAND = (sys.executable, "-m", "cache_builder.build_job")
_READ_BYTES = 1 << 16


@dataclass(frozen=True)
class Outcome:
    """How a build ended; `message` says why it failed, and `code` is then its exit code, None where it just died."""

    report: Mapping[str, Any] = field(default_factory=dict)
    keep: Mapping[str, Any] = field(default_factory=dict)
    message: str | None = None
    code: int | None = 0


class BuildProcess:
    """Started at once, so that its libraries are loaded when `begin` tells it what to build."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        # A group of its own: Ctrl-C is the service's to answer. It ends when its stdin does, so nobody else has that.
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=own_code(), process_group=0, bufsize=0
        )
        assert self._child.stdout is not None
        os.set_blocking(self._child.stdout.fileno(), False)
        self._rest = b""
        self._heard_s = time.monotonic()
        self._last: dict[str, Any] = {}

    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._child.poll() is None

    def begin(self, job: Mapping[str, Any]) -> None:
        """Tell it what to build (build_job.py); a process that is dead by then shows it as its outcome."""
        assert self._child.stdin is not None
        self._heard_s = time.monotonic()
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps(job).encode() + b"\n")

    def news(self) -> list[dict[str, Any]]:
        """What it has said since the last call."""
        assert self._child.stdout is not None
        said = b""
        while part := self._child.stdout.read(_READ_BYTES):
            said += part
        *lines, self._rest = (self._rest + said).split(b"\n")
        found: list[dict[str, Any]] = [json.loads(line) for line in lines]
        if found:
            self._heard_s = time.monotonic()
            self._last = found[-1]
        return found

    @property
    def silent_s(self) -> float:
        """How long it has said nothing, seconds."""
        return time.monotonic() - self._heard_s

    def outcome(self) -> Outcome | None:
        """How it ended; None while it runs."""
        code = self._child.poll()
        if code is None:
            return None
        self.news()
        report, keep = self._last.get("report", {}), self._last.get("keep", {})
        if code == 0 and keep:
            return Outcome(report, keep)
        if "failed" in self._last:
            return Outcome(report, {}, self._last["failed"], self._last["code"])
        return Outcome(message=_death(code), code=None)

    def ask_to_stop(self) -> None:
        """Let it end after its batch."""
        if self.is_alive():
            self._child.terminate()

    def kill(self) -> None:
        """End it at once, with whatever it has started; what it has committed stays."""
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()


def own_code() -> dict[str, str]:
    """The environment of a Python that imports this program's packages, whatever lies in the working directory."""
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    return os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def _death(code: int) -> str:
    if code >= 0:
        return f"the build's process ended with {code}, as its last lines above say"
    name = signal.Signals(-code).name
    why = " (did memory run out?)" if -code == signal.SIGKILL else ""
    return f"the build's process was ended by {name}{why}; what was stored stays"
