"""Runs cache-serve, its builds, and encoders, in forks of a process that has imported the heavy libraries.

    python service_server.py SOCKET                  the server: a line of JSON each connection -> pid
    python service_server.py SOCKET MODULE WORDS     what a service is told to start builds with, or a build encoders:
                                                     takes its pipes to the server, which runs MODULE

Nothing is computed here before a fork: threads of a library would not survive it.
"""

import importlib
import json
import os
import select
import signal
import socket
import sys

HEAVY = (
    "cache_builder.build_job",
    "cache_builder.cli",
    "cache_builder.dry_run",
    "cache_builder.encoder_process",
    "cache_builder.patterns",
    "cache_builder.serve",
    "cache_builder.show",
    "cache_builder.store_cli",
    "cache_builder.verify",
    "shared.model_folder",
    "tests.cache_builder.command_server",
    "typer.rich_utils",
)


def serve_forks(path: str) -> None:
    from cache_builder import build_job

    for name in (*HEAVY, *build_job._LIBRARIES):
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a service
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen(32)
    os.rename(path + ".new", path)
    listener.settimeout(5)
    parent = os.getppid()
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            if os.getppid() != parent:  # the tests are gone
                return
            continue
        message, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 3)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if descriptors:
                _run(connection, descriptors, *json.loads(message))
            _serve(json.loads(message))
        if not descriptors:
            connection.sendall(f"{pid}\n".encode())
        for descriptor in descriptors:
            os.close(descriptor)
        connection.close()


def _serve(job: dict[str, object]) -> None:
    code = 1
    try:
        out, err = (os.open(str(job[name]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) for name in ("out", "err"))
        for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
            os.dup2(descriptor, target)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from pathlib import Path

        from cache_builder.serve import ServeOptions, serve
        from cache_builder.serve_config import ServeConfig
        from shared.command import run_command
        from shared.config import load_config

        options = ServeOptions(**job["options"])  # type: ignore[arg-type]

        def cache_serve() -> None:
            serve(load_config(ServeConfig, [Path(str(job["config"]))], list(job["sets"])), options)  # type: ignore[call-overload]

        run_command(cache_serve, [])
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0
    finally:
        sys.stderr.flush()
        with open(f"{job['err']}.code", "w") as file:
            file.write(str(code))
        os._exit(code)


def _run(connection: socket.socket, descriptors: list[int], module: str, *words: str) -> None:
    """The work in a fork of this fork, which waits for it, tells its client, and kills it where that was killed."""
    worker = os.fork()
    if worker == 0:
        connection.close()
        for target, descriptor in enumerate(descriptors):
            os.dup2(descriptor, target)
            os.close(descriptor)
        importlib.import_module(module)._main(*words)
        os._exit(0)
    for descriptor in descriptors:
        os.close(descriptor)
    try:
        connection.sendall(f"{worker}\n".encode())
        while (ended := os.waitpid(worker, os.WNOHANG)) == (0, 0):
            if select.select([connection], [], [], 0.02)[0]:
                os.kill(worker, signal.SIGKILL)
        connection.sendall(f"{os.waitstatus_to_exitcode(ended[1])}\n".encode())
    finally:
        os._exit(0)


def be_client(path: str, *job: str) -> None:
    """Hand the pipes over, hand signals on, and end as the work does."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    socket.send_fds(connection, [json.dumps(job).encode()], [0, 1, 2])
    for descriptor in (0, 1):
        os.close(descriptor)
    answers = connection.makefile()
    pid = int(answers.readline())
    signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
    code = int(answers.readline() or 1)
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[2:]:
        be_client(*sys.argv[1:])
    else:
        serve_forks(sys.argv[1])
