"""Runs cache-build in forks of a process that has imported the heavy libraries, so that each run costs no start.

A line of JSON on stdin, one on stdout: {"argv", "out", "err", "file_limit"} -> pid; {"wait": pid} -> exit code.
Nothing is computed here before a fork: threads of a library would not survive it.
"""

import json
import os
import resource
import sys
import traceback


def main() -> None:
    import transformers.models.clip.modeling_clip
    import transformers.models.clip.tokenization_clip  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        answer = _exit_code(job["wait"]) if "wait" in job else _start(job)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def _exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _start(job: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _become(job)
        from cache_builder.cli import cache_build

        cache_build()
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _become(job: dict) -> None:
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, job["out"], os.O_WRONLY | os.O_CREAT),
        (2, job["err"], os.O_WRONLY | os.O_CREAT),
    ):
        os.dup2(os.open(path, flags, 0o644), descriptor)
    sys.argv = ["cache-build", *job["argv"]]
    if job["file_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
