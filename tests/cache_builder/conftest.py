"""Small data sets, builds in this process, and cache-build as a process of its own that can be killed."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cache_builder.build import BuildOptions, build
from cache_builder.config import BuildConfig
from cache_builder.report import BuildReport
from cache_builder.sources.folder import FolderSource
from shared.config import load_config
from tests.s3_server import BUCKET, s3_server

SERVICE_SERVER = Path(__file__).with_name("service_server.py")
IMPORTED_S = 600
SMALL = ("images.resolution=64", "images.step=16", "encode.batch=4")


def build_folders(
    folders: Sequence[Path], store: Path, model: Path, *sets: str, datasets: Sequence[str] = (), **options: Any
) -> BuildReport:
    """A build in this process, on the CPU, at 64 px; data sets are called as their folders unless named."""
    config = load_config(BuildConfig, sets=[*SMALL, *sets])
    names = datasets or [folder.name for folder in folders]
    sources = [
        FolderSource(folder, name, config.captions, config.images.max_bytes)
        for folder, name in zip(folders, names, strict=True)
    ]
    return build(sources, model, config, BuildOptions(store, **({"manifest": "main", "device": "cpu"} | options)))


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """Lines of stderr that are not progress."""
        lines = self.err.splitlines()
        return [line for line in lines if not line.startswith("loading ") and not line.endswith(" s left")]


class Running:
    """A command that has been started."""

    def __init__(self, pid: int, out: Path, err: Path, wait: Callable[[], int]) -> None:
        self.pid, self.out, self.err, self._wait = pid, out, err, wait

    def finish(self) -> Finished:
        """Wait for its end."""
        return Finished(self._wait(), self.out.read_text(), self.err.read_text())


class Commands:
    """cache-build as users run it, in forks of command_server.py, which is a fork itself."""

    def __init__(self, folder: Path, server: "ForkServer") -> None:
        server.wait()
        self._server = subprocess.Popen(
            server.command("tests.cache_builder.command_server", str(folder)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._folder, self._count = folder, 0
        self.encoders: Sequence[str] = ()  # what encoder processes are started with, if not as users' are
        self.environment: Mapping[str, str] = {}  # beside that of the tests

    def start(self, *arguments: str | Path, file_limit: int = 0, command: str = "cache_build") -> Running:
        """Start `cache-build ARGUMENTS`; `file_limit` is the longest file it may write, bytes."""
        self._count += 1
        out, err = (self._folder / f"{self._count}.{name}" for name in ("out", "err"))
        argv = [os.fspath(argument) for argument in arguments]
        job = {"argv": argv, "out": str(out), "err": str(err), "file_limit": file_limit, "command": command}
        pid = self._ask(job | {"encoders": self.encoders, "environment": dict(self.environment)})
        return Running(pid, out, err, lambda: self._ask({"wait": pid}))

    def run(self, *arguments: str | Path, file_limit: int = 0) -> Finished:
        """Run `cache-build ARGUMENTS` to its end."""
        return self.start(*arguments, file_limit=file_limit).finish()

    def store(self, *arguments: str | Path) -> Finished:
        """Run `cache-store ARGUMENTS` to its end."""
        return self.start(*arguments, command="cache_store").finish()

    def build(self, folder: Path, store: Path, model: Path, *more: str, file_limit: int = 0) -> Finished:
        """Run it as `build_folders` does, with a JSON report."""
        return self.run(*build_arguments(folder, store, model, *more), file_limit=file_limit)

    def start_build(self, folder: Path, store: Path, model: Path, *more: str) -> Running:
        """Start what `build` runs."""
        return self.start(*build_arguments(folder, store, model, *more))

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()

    def _ask(self, job: dict[str, Any]) -> int:
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())


def build_arguments(folder: Path, store: Path, model: Path, *more: str) -> list[str]:
    """The command line of a small build."""
    sets = [part for setting in SMALL for part in ("--set", setting)]
    paths = [os.fspath(folder), "--store", os.fspath(store), "--model", os.fspath(model)]
    return [*paths, "--device", "cpu", "--json", *sets, *more]


@dataclass(frozen=True)
class ForkServer:
    """service_server.py: what it starts costs no imports, for those are done once."""

    socket: str
    process: "subprocess.Popen[bytes]"

    def command(self, *job: str) -> list[str]:
        """What starts the module of cache_builder that `job` names, with words of its own."""
        return [sys.executable, "-S", "-E", str(SERVICE_SERVER), self.socket, *job]

    def wait(self) -> None:
        """Until it has imported what is heavy."""
        end_s = time.monotonic() + IMPORTED_S
        while not os.path.exists(self.socket):
            assert self.process.poll() is None
            assert time.monotonic() < end_s
            time.sleep(0.02)


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Where services, their builds and encoders are forked."""
    path = str(tmp_path_factory.mktemp("s") / "socket")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, str(SERVICE_SERVER), path], env=environment)
    yield ForkServer(path, process)
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)  # and says nothing
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:  # nobody ever asked it
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Iterator[Commands]:
    """Where cache-build is run."""
    server = Commands(tmp_path_factory.mktemp("commands"), fork_server)
    yield server
    server.close()


@pytest.fixture
def forked_encoders(fork_server: ForkServer, commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoder processes, here and in commands, are forks."""
    fork_server.wait()
    monkeypatch.setattr("cache_builder.encoder_process.COMMAND", fork_server.command("cache_builder.encoder_process"))
    monkeypatch.setattr(commands, "encoders", fork_server.command("cache_builder.encoder_process"))


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[dict[str, str]]:
    """That of an S3 server on loopback."""
    with s3_server() as environment:
        yield environment


@pytest.fixture
def bucket(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """An address on it; each test takes a prefix of its own."""
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}"


@pytest.fixture(scope="session")
def run_build() -> Callable[..., BuildReport]:
    """`build_folders`, for test modules, which cannot import each other."""
    return build_folders


@pytest.fixture(scope="session")
def arguments_of() -> Callable[..., list[str]]:
    """`build_arguments`."""
    return build_arguments
