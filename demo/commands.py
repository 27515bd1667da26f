"""Run commands as users type them, each shown before it runs."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def start(command: Sequence[str], environment: Mapping[str, str] | None = None) -> "subprocess.Popen[bytes]":
    """Start a command of this environment; `environment` is added to the process's own."""
    shown = ["python" if part == sys.executable else part for part in command]
    print(f"$ {shlex.join(shown)}", flush=True)
    scripts = Path(sys.executable).parent  # the environment's own console scripts, whatever PATH says
    program = command[0] if command[0] == sys.executable else str(scripts / command[0])
    return subprocess.Popen([program, *command[1:]], env={**os.environ, **(environment or {})})


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Run a command to its end; raises CalledProcessError with its exit code where that is not 0."""
    if code := start(command, environment).wait():
        raise subprocess.CalledProcessError(code, list(command))
