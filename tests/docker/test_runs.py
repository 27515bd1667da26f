"""The set-up's own commands as plain processes, in one PID namespace as compose.yaml asks, and in one for each."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.runlog import read_events
from tests.docker.compose import read_compose
from tests.pictures import write_shapes

ROOT = Path(__file__).resolve().parents[2]
CACHE = "[images]\nresolution = 64\nstep = 16\n\n[split]\neval_fraction = 0.1\n"
TRAIN = "steps = 3\nbatch = 1\naccumulation = 1\ngradient_checkpointing = false\n\n[log]\ntrackers = []\n"
PIDS = ("--pid", "--fork", "--kill-child")
WORKERS = ("cache", "train-base", "train-refiner")


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
        self.places = {f"/{name}": folder / name for name in ("store", "runs", "settings", "data")}
        for place in self.places.values():
            place.mkdir()
        self.places["/models/tiny"] = model
        self.logs = folder
        (self.places["/settings"] / "cache.toml").write_text(CACHE)
        (self.places["/settings"] / "train.toml").write_text(TRAIN)
        write_shapes(self.places["/data"], 24)

    def line(self, name: str, *more: str) -> str:
        """A service's command as a shell runs it here; its exit code goes to NAME.code, what it says to NAME.err."""
        words = [self._here(word) for word in read_compose()["services"][name]["command"]]
        command = shlex.join([str(Path(sys.executable).parent / words[0]), *words[1:], *more])
        return (
            f"{command} 2>{shlex.quote(str(self.logs / name))}.err; echo $? >{shlex.quote(str(self.logs / name))}.code"
        )

    def start(self, script: str) -> "subprocess.Popen[str]":
        own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [*UNSHARE, "sh", "-c", script], cwd=ROOT, env=os.environ | own, stdout=subprocess.DEVNULL, text=True
        )

    def code(self, name: str) -> int:
        return int((self.logs / f"{name}.code").read_text())

    def said(self, name: str) -> list[str]:
        return (self.logs / f"{name}.err").read_text().splitlines()

    def _here(self, word: str) -> str:
        inside = next((place for place in self.places if word == place or word.startswith(f"{place}/")), None)
        return word if inside is None else str(self.places[inside]) + word.removeprefix(inside)


@pytest.fixture
def set_up(tmp_path: Path, tiny_model: Path) -> SetUp:
    return SetUp(tmp_path, tiny_model)


def test_all_come_up_at_once_in_one_pid_namespace(set_up: SetUp) -> None:
    """Both trainers begin before there is a store, wait for its manifest, and train."""
    script = " & ".join(f"({set_up.line(name)})" for name in WORKERS)
    process = set_up.start(f"{script} & wait")
    assert process.wait(timeout=300) == 0
    assert {name: set_up.code(name) for name in WORKERS} == dict.fromkeys(WORKERS, 0), [*map(set_up.said, WORKERS)]
    for expert in ("base", "refiner"):
        run = set_up.places["/runs"] / expert
        assert [event["step"] for event in read_events(run / "events.jsonl") if event["event"] == "checkpoint"] == [3]
        facts: dict[str, Any] = json.loads((run / "expert.json").read_text())["facts"]
        assert facts["name"] == expert
        waited = f"waiting for manifest 'main' in {set_up.places['/store']}"
        assert waited in set_up.said(f"train-{expert}")


def test_in_namespaces_of_their_own_the_second_says_why_it_cannot(set_up: SetUp) -> None:
    assert set_up.start(set_up.line("cache")).wait(timeout=300) == 0
    first = set_up.start(set_up.line("train-base", "--set", "steps=100000"))
    base = set_up.places["/runs"] / "base" / "events.jsonl"
    while not base.exists() or not any(event["event"] == "step" for event in read_events(base)):
        assert first.poll() is None, set_up.said("train-base")
    second = set_up.start(set_up.line("train-refiner"))
    assert second.wait(timeout=300) == 0
    first.kill()
    first.wait()
    assert set_up.code("train-refiner") == 75
    assert "PID namespace" in set_up.said("train-refiner")[-1]
