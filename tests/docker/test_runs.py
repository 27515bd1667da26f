"""The set-up's own commands as plain processes, in one PID namespace as compose.yaml asks, and in one for each."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.runlog import read_events
from tests.docker.compose import DOCKER, read_compose
from tests.pictures import write_shapes

ROOT = Path(__file__).resolve().parents[2]
SMALL = "resolution = 64\nstep = 16"
TRAIN = "steps = 3\nbatch = 1\naccumulation = 1\ngradient_checkpointing = false\n\n[log]\ntrackers = []\n"
PIDS = ("--pid", "--fork", "--kill-child", "--mount-proc")
WORKERS = ("cache", "train-base", "train-refiner", "evaluate")
QUICK = {"evaluate": ("--steps", "2", "--held-out", "0", "--draws", "4", "--max-share", "1")}
PATIENCE_S = 500
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _unshare() -> list[str]:
    for how in (["unshare", *PIDS], ["unshare", "--user", "--map-root-user", *PIDS]):
        if shutil.which("unshare") and subprocess.run([*how, "true"], capture_output=True, check=False).returncode == 0:
            return how
    return []


UNSHARE = _unshare()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not UNSHARE, reason="PID namespaces cannot be made here")]


class SetUp:
    """Where the volumes lie, and what compose.yaml runs on them."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.places = {f"/{name}": folder / name for name in ("store", "runs", "settings", "data", "run/secrets")}
        for place in self.places.values():
            place.mkdir(parents=True)
        self.places["/models/tiny"] = model
        self.folder, self.port = folder, free_port()
        self.started: list[subprocess.Popen[str]] = []
        (self.places["/settings"] / "cache.toml").write_text(self._settings())
        (self.places["/settings"] / "train.toml").write_text(TRAIN)
        (self.places["/settings"] / "prompts.txt").write_text("a red circle\n")
        (self.places["/run/secrets"] / "page_token").write_text("0123456789abcdef\n")
        write_shapes(self.places["/data"], 24)

    def line(self, name: str, *more: str) -> str:
        """A service's command as a shell runs it here; NAME.pid, NAME.code and NAME.err say what became of it."""
        words = [self._here(word) for word in read_compose()["services"][name]["command"]]
        module, _, function = PROJECT["scripts"][words[0]].partition(":")
        script = [sys.executable, "-c", f"from {module} import {function} as run; run()"]
        command = shlex.join([*script, *words[1:], *QUICK.get(name, ()), *more])
        file = shlex.quote(str(self.folder / name))
        return f"{command} 2>{file}.err & echo $! >{file}.pid; wait $!; echo $? >{file}.code"

    def healthcheck(self, name: str) -> str:
        """A service's own check, as a shell runs it here."""
        _, python, *words = read_compose()["services"][name]["healthcheck"]["test"]
        assert python == "python"
        return shlex.join([sys.executable, *(word.replace("8765", str(self.port)) for word in words)])

    def start(self, script: str) -> "subprocess.Popen[str]":
        own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [*UNSHARE, "sh", "-c", script], cwd=ROOT, env=os.environ | own, stdout=subprocess.DEVNULL, text=True
        )
        self.started.append(process)
        return process

    def kill_all(self) -> None:
        """End what still runs: whoever made a PID namespace takes all that is in it along."""
        for process in self.started:
            process.kill()
            process.wait()

    def code(self, name: str) -> int:
        return int((self.folder / f"{name}.code").read_text())

    def said(self, name: str) -> list[str]:
        return (self.folder / f"{name}.err").read_text().splitlines()

    def has_manifest(self) -> bool:
        return (self.places["/store"] / "manifests/main/current.json").exists()

    def _settings(self) -> str:
        """docker/settings/cache.toml, for small pictures and with places of this machine."""
        text = (DOCKER / "settings/cache.toml").read_text().replace("resolution = 1024", SMALL)
        text = text.replace("port = 8765", f"port = {self.port}") + "\n[split]\neval_fraction = 0.1\n"
        for inside, place in self.places.items():
            text = text.replace(f'"{inside}', f'"{place}')
        return text

    def _here(self, word: str) -> str:
        key, equals, path = word.rpartition("=")
        inside = next((place for place in self.places if path == place or path.startswith(f"{place}/")), None)
        return word if inside is None else f"{key}{equals}{self.places[inside]}{path.removeprefix(inside)}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@pytest.fixture
def set_up(tmp_path: Path, tiny_model: Path) -> Iterator[SetUp]:
    made = SetUp(tmp_path, tiny_model)
    yield made
    made.kill_all()


def test_all_come_up_at_once_in_one_pid_namespace(set_up: SetUp) -> None:
    """Trainers and evaluation begin before there is a store, and end; the service is healthy until it is stopped."""
    others = [name for name in WORKERS if name != "cache"]
    all_others = "".join(f"({set_up.line(name)}) & {name.replace('-', '_')}=$!; " for name in others)
    waits = "; ".join(f"wait ${name.replace('-', '_')}" for name in others)
    stop = f"kill $(cat {shlex.quote(str(set_up.folder))}/cache.pid); wait $cache"
    health = f"{set_up.healthcheck('cache')}; echo $? >{shlex.quote(str(set_up.folder))}/health.code"
    process = set_up.start(f"({set_up.line('cache')}) & cache=$!; {all_others} {waits}; {health}; {stop}")
    assert process.wait(timeout=PATIENCE_S) == 0
    assert {name: set_up.code(name) for name in WORKERS} == dict.fromkeys(WORKERS, 0), [*map(set_up.said, WORKERS)]
    assert set_up.code("health") == 0, (set_up.places["/store"] / "service/page.log").read_text()
    for expert in ("base", "refiner"):
        run = set_up.places["/runs"] / expert
        assert [event["step"] for event in read_events(run / "events.jsonl") if event["event"] == "checkpoint"] == [3]
        facts: dict[str, Any] = json.loads((run / "expert.json").read_text())["facts"]
        assert facts["name"] == expert
        waited = f"waiting for manifest 'main' in {set_up.places['/store']}"
        assert waited in set_up.said(f"train-{expert}")
    report = json.loads((set_up.places["/runs"] / "evaluation/report.json").read_text())
    assert [(one["name"], one["step"]) for one in report["rounds"][-1]["experts"]] == [("base", 3), ("refiner", 3)]
    events = list(read_events(set_up.places["/store"] / "service/events.jsonl"))
    assert [event["event"] for event in events][-2:] == ["page_end", "service_stop"]


def test_in_namespaces_of_their_own_the_second_says_why_it_cannot(set_up: SetUp) -> None:
    service = set_up.start(set_up.line("cache"))
    while not set_up.has_manifest():
        assert service.poll() is None, set_up.said("cache")
        time.sleep(0.1)
    service.kill()
    service.wait()
    first = set_up.start(set_up.line("train-base", "--set", "steps=100000"))
    base = set_up.places["/runs"] / "base" / "events.jsonl"
    while not base.exists() or not any(event["event"] == "step" for event in read_events(base)):
        assert first.poll() is None, set_up.said("train-base")
        time.sleep(0.1)
    second = set_up.start(set_up.line("train-refiner"))
    assert second.wait(timeout=PATIENCE_S) == 0
    first.kill()
    first.wait()
    assert set_up.code("train-refiner") == 75
    assert "PID namespace" in set_up.said("train-refiner")[-1]
