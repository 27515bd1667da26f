"""The set-up's own commands as plain processes, in one PID namespace as compose.yaml asks, and in one for each.

Where mounts may be made, each sees a read-only file system with its own volumes in it, and has no capabilities. All
have the variables that the image sets.
"""

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
NO_RIGHTS = "setpriv --no-new-privs --bounding-set=-all --inh-caps=-all"
SERVICES: dict[str, Any] = read_compose()["services"]
ENDS = ("train-base", "train-refiner", "evaluate")  # by themselves
QUICK = {"evaluate": ("--steps", "2", "--held-out", "0", "--draws", "4", "--max-share", "1")}
PATIENCE_S = 500
BIN = Path(sys.executable).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _unshare() -> list[str]:
    for how in (["unshare", *PIDS], ["unshare", "--user", "--map-root-user", *PIDS]):
        if shutil.which("unshare") and subprocess.run([*how, "true"], capture_output=True, check=False).returncode == 0:
            return how
    return []


UNSHARE = _unshare()
CAN_CONFINE = (
    bool(UNSHARE and shutil.which("setpriv"))
    and not subprocess.run(
        [*UNSHARE, "sh", "-ec", f"mount -o remount,ro,bind /; exec {NO_RIGHTS} true"], capture_output=True, check=False
    ).returncode
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not UNSHARE, reason="PID namespaces cannot be made here")]


class SetUp:
    """Where the volumes lie, and what compose.yaml runs on them."""

    def __init__(self, folder: Path, model: Path) -> None:
        names = ("store", "runs", "settings", "data", "run/secrets", "models", "tmp")
        self.places = {"/models/tiny": model, **{f"/{name}": folder / name for name in names}}
        for name in names:
            (folder / name).mkdir(parents=True)
        self.folder, self.port = folder, free_port()
        self.ports = {"8765": str(self.port), "6006": str(free_port())}
        self.started: list[subprocess.Popen[str]] = []
        (self.places["/settings"] / "cache.toml").write_text(self._settings())
        (self.places["/settings"] / "train.toml").write_text(TRAIN)
        (self.places["/settings"] / "prompts.txt").write_text("a red circle\n")
        (self.places["/run/secrets"] / "page_token").write_text("0123456789abcdef\n")
        write_shapes(self.places["/data"], 24)

    def line(self, name: str, *more: str) -> str:
        """A service's command as a shell runs it here; NAME.pid, NAME.code and NAME.err say what became of it."""
        words = [self.ports.get(word, self._here(word)) for word in SERVICES[name]["command"]]
        script = [str(BIN / words[0]) if (BIN / words[0]).exists() else words[0]]
        if words[0] in PROJECT["scripts"]:
            module, _, function = PROJECT["scripts"][words[0]].partition(":")
            script = [sys.executable, "-c", f"from {module} import {function} as run; run()"]
        command = shlex.join([*self._confined(name), *script, *words[1:], *QUICK.get(name, ()), *more])
        file = shlex.quote(str(self.folder / name))
        return f"{command} 2>{file}.err & echo $! >{file}.pid; wait $!; echo $? >{file}.code"

    def healthcheck(self, name: str) -> str:
        """A service's own check, as a shell runs it here, now and then as docker does; its code goes to NAME.health."""
        kind, *words = SERVICES[name]["healthcheck"]["test"]
        for said, here in {**self.ports, " /runs/": f" {self.places['/runs']}/"}.items():
            words = [word.replace(said, here) for word in words]
        check = words[0] if kind == "CMD-SHELL" else shlex.join(words).replace("python ", f"{sys.executable} ", 1)
        file = shlex.quote(str(self.folder / name))
        tries = "for i in 1 2 3 4 5 6 7 8 9 10; do"
        again = "code=$?; test $code = 0 && break; sleep 3; done"
        return f"{tries} ({check}) 2>>{file}.checks; {again}; echo $code >{file}.health"

    def start(self, script: str) -> "subprocess.Popen[str]":
        own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        own |= {name: self._here(value) for name, value in image_variables().items()} | {"TMPDIR": self._here("/tmp")}
        process = subprocess.Popen(
            [*UNSHARE, "sh", "-c", script], cwd=ROOT, env=os.environ | own, stdout=subprocess.DEVNULL, text=True
        )
        self.started.append(process)
        return process

    def _confined(self, name: str) -> list[str]:
        """What runs a service's command with the mounts and the rights that compose.yaml leaves it."""
        if not CAN_CONFINE:
            return []
        volumes = {volume["target"]: volume.get("read_only", False) for volume in SERVICES[name].get("volumes", ())}
        mounts = [(self.folder, True), *((self.places[target], only) for target, only in volumes.items())]
        mounts.append((self.places["/tmp"], False))
        steps = []
        for place, is_read_only in mounts:
            at = shlex.quote(str(place))
            steps += [f"mount --bind {at} {at}", f"mount -o remount,{'ro' if is_read_only else 'rw'},bind {at}"]
        steps += ["mount -o remount,ro,bind /", f'exec {NO_RIGHTS} "$@"']
        return ["unshare", "--mount", "sh", "-ec", "; ".join(steps), name]

    def kill_all(self) -> None:
        """End what still runs: whoever made a PID namespace takes all that is in it along."""
        for process in self.started:
            process.kill()
            process.wait()

    def code(self, name: str) -> int:
        return int((self.folder / f"{name}.code").read_text())

    def health(self, name: str) -> int:
        return int((self.folder / f"{name}.health").read_text())

    def said(self, name: str) -> list[str]:
        return (self.folder / f"{name}.err").read_text().splitlines()

    def has_manifest(self) -> bool:
        return (self.places["/store"] / "manifests/main/current.json").exists()

    def _settings(self) -> str:
        """docker/settings/cache.toml, for small pictures and with places of this machine."""
        text = (DOCKER / "settings/cache.toml").read_text().replace("resolution = 1024", SMALL)
        text = text.replace("port = 8765", f"port = {self.port}") + "\n[split]\neval_fraction = 0.1\n"
        for inside in ("/store", "/runs", "/data", "/run/secrets"):
            text = text.replace(f'"{inside}', f'"{self.places[inside]}')
        return text

    def _here(self, word: str) -> str:
        key, equals, path = word.rpartition("=")
        inside = next((place for place in self.places if path == place or path.startswith(f"{place}/")), None)
        return word if inside is None else f"{key}{equals}{self.places[inside]}{path.removeprefix(inside)}"


def image_variables() -> dict[str, str]:
    """What the image sets for every command, but where it has its own programs."""
    last = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ").rpartition("\nENV ")[2].splitlines()[0]
    found = dict(part.split("=", 1) for part in last.split())
    assert found.pop("PATH").startswith("/opt/sdxl-experts/bin")
    return found


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
    all_at_once = " ".join(f"({set_up.line(name)}) & {name.replace('-', '_')}=$!;" for name in SERVICES)
    waits = "; ".join(f"wait ${name.replace('-', '_')}" for name in ENDS)
    checks = "; ".join(set_up.healthcheck(name) for name in SERVICES)
    stops = "; ".join(
        f"kill $(cat {shlex.quote(str(set_up.folder))}/{name}.pid); wait ${name}"
        for name in SERVICES
        if name not in ENDS
    )
    process = set_up.start(f"{all_at_once} {waits}; {checks}; {stops}; exit 0")
    assert process.wait(timeout=PATIENCE_S) == 0
    ended = (*ENDS, "cache")
    assert {name: set_up.code(name) for name in ended} == dict.fromkeys(ended, 0), [*map(set_up.said, ended)]
    unwell = {name: set_up.said(name) for name in SERVICES if set_up.health(name)}
    assert unwell == {}, (set_up.places["/store"] / "service/page.log").read_text()
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
