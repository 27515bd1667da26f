"""The page beside the service: `python -m dashboard`, a process of its own session, which outlives a killed service.

The page writes STORE/service/page.json (pid, host, port, created_s); a service that starts takes over the page that a
killed one left, where it was started by the same command, and else ends it. One that dies, or hangs (page_health.py)
and is ended for that, is started again, after a pause that doubles up to a minute. What it says goes to
STORE/service/page.log.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from cache_builder.build_process import own_code
from cache_builder.page_health import PageHealth
from cache_builder.serve_config import ServeConfig
from shared.progress import say
from shared.runlog import RunLog

MOST_PAUSE_S = 60.0
LIVED_S = 60.0  # a page that lived so long did not fail to start
END_S = 5.0
SAME_START_S = 1.0  # clocks of /proc are coarse


class PageProcess:
    """Looked at now and then; alive or about to be started again."""

    def __init__(self, command: Sequence[str], folder: Path, log: RunLog, hung_s: float) -> None:
        """A page that `command` starts, that writes page.json into `folder`, and that hangs after silence, seconds."""
        self._command, self._folder, self._log, self._hung_s = list(command), folder, log, hung_s
        self._pause_s, self._start_at_s, self._began_s = 1.0, 0.0, 0.0
        self._process: psutil.Process | psutil.Popen | None = self._left_behind()
        self._health = PageHealth(folder / "page.json", hung_s)

    def look(self) -> None:
        """Start the page if it is not there and it is time; end one that hangs."""
        now_s = time.monotonic()
        if self._process is not None and not _is_alive(self._process):
            self._note_end(now_s, _last_line(self._folder / "page.log"))
        elif self._process is not None and self._health.is_hung(now_s):
            _kill(self._process)
            self._note_end(now_s, f"it had answered nothing for {self._hung_s:g} s")
        if self._process is None and now_s >= self._start_at_s:
            self._start(now_s)

    def close(self) -> None:
        """End the page."""
        if self._process is not None and _is_alive(self._process):
            _end(self._process)
            self._log.write("page_end", pid=self._process.pid, said="")
        self._health.close()
        self._process = None

    def _start(self, now_s: float) -> None:
        (self._folder / "page.json").unlink(missing_ok=True)
        with (self._folder / "page.log").open("wb") as log:
            self._process = psutil.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=own_code(),
                start_new_session=True,
            )
        self._began_s = now_s
        self._health = PageHealth(self._folder / "page.json", self._hung_s)
        self._log.write("page_start", pid=self._process.pid)

    def _note_end(self, now_s: float, said: str) -> None:
        assert self._process is not None
        self._health.close()
        if now_s - self._began_s > LIVED_S:
            self._pause_s = 1.0
        self._log.write("page_end", pid=self._process.pid, said=said)
        say(f"the page has ended{f' ({said})' if said else ''}; it is started again in {self._pause_s:g} s")
        self._process = None
        self._start_at_s = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, MOST_PAUSE_S)

    def _left_behind(self) -> psutil.Process | None:
        """The page that a killed service left, if it is what this one would start; another one is ended."""
        process = _process_of(self._folder / "page.json")
        if process is None:
            return None
        if _command_of(process)[1:] == self._command[1:]:
            self._log.write("page_start", pid=process.pid, adopted=True)
            return process
        _end(process)
        self._log.write("page_end", pid=process.pid, said="")
        return None


def page_command(config: ServeConfig) -> list[str]:
    """How the page of a service is started."""
    page, command = config.page, [sys.executable, "-m", "dashboard", "--store", str(config.store)]
    for run in config.runs:
        command += ["--run", str(run)]
    if config.runs_under is not None:
        command += ["--runs-under", str(config.runs_under)]
    command += ["--host", page.host, "--port", str(page.port)]
    if page.token_file is not None:
        command += ["--token-file", str(page.token_file)]
    for name in page.allowed_hosts:
        command += ["--allowed-host", name]
    return command


def _process_of(card: Path) -> psutil.Process | None:
    """The live process that wrote `card`; None where it is gone, or the pid is another's by now."""
    try:
        said = json.loads(card.read_text())
        process = psutil.Process(int(said["pid"]))
        is_same = abs(process.create_time() - float(said["created_s"])) < SAME_START_S
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None
    return process if is_same and "dashboard" in _command_of(process) and _is_alive(process) else None


def _command_of(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def _is_alive(process: psutil.Process | psutil.Popen) -> bool:
    if isinstance(process, psutil.Popen):
        return process.poll() is None
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _end(process: psutil.Process | psutil.Popen) -> None:
    try:
        process.terminate()
        process.wait(END_S)
    except psutil.TimeoutExpired:
        process.kill()
    except psutil.Error:
        return


def _kill(process: psutil.Process | psutil.Popen) -> None:
    with contextlib.suppress(psutil.Error):
        process.kill()
        process.wait(END_S)


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][:500] if lines else ""
