"""Runs cache-build and cache-store in forks of itself, which is one of service_server.py: no run costs a start.

A line of JSON on stdin, one on stdout: {"command", "argv", "out", "err", "file_limit", "encoders", "environment"} ->
pid; {"wait": pid} -> exit code.
Nothing is computed here before a fork: threads of a library would not survive it.
"""

import json
import os
import resource
import signal
import sys
import traceback
from typing import Any


def _main(folder: str) -> None:
    os.chdir(folder)
    for line in sys.stdin:
        job = json.loads(line)
        answer = _exit_code(job["wait"]) if "wait" in job else _start(job)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def _exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _start(job: dict[str, Any]) -> int:
    for path in (job["out"], job["err"]):
        open(path, "wb").close()  # there from the start, however early the child is killed
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
        _become(job)
        from cache_builder import cli

        getattr(cli, job["command"])()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _become(job: dict[str, Any]) -> None:
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, job["out"], os.O_WRONLY | os.O_CREAT),
        (2, job["err"], os.O_WRONLY | os.O_CREAT),
    ):
        os.dup2(os.open(path, flags, 0o644), descriptor)
    os.environ |= job["environment"]
    if job["encoders"]:
        from cache_builder import encoder_process

        encoder_process.COMMAND = tuple(job["encoders"])
    sys.argv = [job["command"].replace("_", "-"), *job["argv"]]
    if job["file_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], resource.RLIM_INFINITY))
