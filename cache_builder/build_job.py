"""One build of the service, in a process of its own: `python -m cache_builder.build_job`, told by one line on stdin.

stdin: {"config": ServeConfig, "model", "replace", "allow_shrink"}    build_process.py holds the other ends
stdout: {"ready"} | {"task", "done", "total"} ... | {"report", "keep"} or {"failed", "code", "report"}

The libraries are loaded before the line comes. The build ends with whoever holds its stdin, however that one died.
"""

import importlib
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO, Any

from shared.errors import ExpertsError, Stopped

TOLD_EVERY_S = 0.2
END_S = 30.0  # for a batch to be committed after the other side is gone
_LIBRARIES = (
    "cache_builder.build",
    "cache_builder.datasets",
    "cache_builder.keep",
    "cache_builder.serve_config",
    "diffusers.models.autoencoders.autoencoder_kl",
    "shared.device",
    "shared.text_encoders",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
)


class _Voice:
    """Lines of JSON for the other side; progress not more often than it can be looked at."""

    def __init__(self, pipe: IO[str]) -> None:
        self._pipe, self._told_s = pipe, 0.0

    def say(self, **news: Any) -> None:
        self._pipe.write(json.dumps(news) + "\n")
        self._pipe.flush()

    def advance(self, task: str, done: int, total: int | None) -> None:
        """Tell of progress; not where a service that is stopped has left the pipe full: a build waits for nobody."""
        now_s = time.monotonic()
        is_time = now_s - self._told_s >= TOLD_EVERY_S or done in (0, total)
        if is_time and select.select([], [self._pipe], [], 0)[1]:
            self._told_s = now_s
            self.say(task=task, done=done, total=total)


def run_job(job: dict[str, Any], voice: _Voice) -> int:
    """Build, drop old manifests and tell of it; returns the exit code."""
    from cache_builder.report import BuildReport
    from shared.command import explain_os_error
    from shared.progress import told

    report = BuildReport()
    try:
        with told(voice.advance):
            keep = _build(job, report)
    except KeyboardInterrupt:
        error: ExpertsError = Stopped("interrupted; what was stored stays")
    except OSError as failure:
        error = explain_os_error(failure)
    except ExpertsError as failure:
        error = failure
    else:
        voice.say(report=report.as_json(), keep=keep)
        return 0
    voice.say(failed=str(error), code=error.exit_code, report=report.as_json())
    return error.exit_code


def _build(job: dict[str, Any], report: Any) -> dict[str, Any]:
    from cache_builder.build import BuildOptions, build
    from cache_builder.datasets import open_sources
    from cache_builder.keep import KeepRules, drop_old_manifests
    from cache_builder.serve_config import ServeConfig
    from shared.config import validate
    from shared.prompts import read_prompts_file

    config = validate(ServeConfig, job["config"])
    texts = tuple(dict.fromkeys(read_prompts_file(config.prompts))) if config.prompts else ()
    options = BuildOptions(
        config.store,
        config.manifest,
        config.device,
        replace=job["replace"],
        allow_shrink=job["allow_shrink"],
        prompts=texts,
    )
    build(open_sources(config.datasets), Path(job["model"]), config.build, options, report)
    rules = KeepRules(config.service.keep, config.service.pinned, config.runs, config.runs_under)
    return vars(drop_old_manifests(config.store, config.manifest, rules))


def _end_with_the_other_side() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_S)
    os._exit(Stopped.exit_code)


def _read_line() -> str:
    """One line of stdin, byte by byte: what follows it belongs to the thread that waits for the end."""
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := os.read(0, 1)):
            return ""
        line += byte
    return line.decode()


def _main() -> None:
    voice = _Voice(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)  # whatever a library prints goes where people read
    code = 70
    try:
        for name in _LIBRARIES:
            importlib.import_module(name)
        voice.say(ready=True)
        if line := _read_line():
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the service's to answer
            threading.Thread(target=_end_with_the_other_side, daemon=True).start()
            code = run_job(json.loads(line), voice)
    except BrokenPipeError:
        code = Stopped.exit_code  # nobody listens any more
    except BaseException:  # noqa: BLE001 -- told, and the service says in a line that the build died
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # the thread still waits for the end of stdin


if __name__ == "__main__":
    from shared.command import quiet_libraries, yield_idle_threads

    yield_idle_threads()
    quiet_libraries()
    _main()
