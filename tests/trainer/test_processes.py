"""Two processes over gloo train what one would: the same samples, draws and loss, one run folder, one end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import ConfigError
from tests.trainer.together import SETS, Events, Start, assert_same_run, free_port, start_together
from trainer.checkpoint import newest_checkpoint
from trainer.loop import train_expert
from trainer.processes import Processes, joined


def start_two(start: Start, arguments: list[str]) -> list[Any]:
    return start_together(start, [arguments, arguments])


@pytest.fixture(scope="module")
def whole(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps in one process."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("whole") / "run"
    train_expert(world.request(run, *SETS, "steps=6"))
    return run


def test_two_train_as_one_and_each_goes_on_with_the_others_run(
    world: Any, start: Start, events: Events, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train_expert(world.request(run, *SETS, "steps=2"))  # begun by one
    for command in start_two(start, world.arguments(run, *SETS, "steps=5")):
        assert command.wait() == 0, command.errors()
    train_expert(world.request(run, *SETS, "steps=6"))
    assert_same_run(run, whole, events)
    assert len(events(run, "step")) == 6
    said = [(tmp_path / f"process{rank}.txt").read_text() for rank in range(2)]
    assert "goes on after step 2" in said[0]
    assert said[1] == ""


def test_a_request_to_stop_that_one_hears_ends_both_after_the_same_step(
    world: Any, start: Start, events: Events, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    commands = start_two(start, world.arguments(run, *SETS, "steps=500"))
    commands[1].wait_for(lambda: len(events(run, "step")) >= 2)
    commands[1].signal(signal.SIGTERM)
    assert [command.wait() for command in commands] == [75, 75]
    (stopped,) = events(run, "stopped")
    checkpoint = newest_checkpoint(run, print)
    assert checkpoint is not None
    assert checkpoint.state.step == stopped["step"] == events(run, "step")[-1]["step"]
    assert "process 1: " in commands[1].errors()[-1]


@pytest.mark.slow
def test_two_take_over_the_same_newer_partner(world: Any, start: Start, events: Events, tmp_path: Path) -> None:
    base, exposed = tmp_path / "base", (*SETS, "loss.exposure={share=0.5, reach=300}")
    train_expert(world.request(base, "steps=1", "batch=1"))
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = [*world.arguments(two, *exposed, "steps=4", expert="refiner"), "--partner", str(base)]
    request = replace(world.request(one, *exposed, "steps=4", expert="refiner"), partner=base)
    for run in (one, two):
        train_expert(replace(world.request(run, *exposed, "steps=2", expert="refiner"), partner=base))
    train_expert(world.request(base, "steps=2", "batch=1"))
    train_expert(request)
    for command in start_two(start, arguments):
        assert command.wait() == 0, command.errors()
    assert_same_run(two, one, events)
    met = [(event["step"], event["partner_step"]) for event in events(two, "partner")]
    assert met == [(0, 1), (2, 1), (3, 2)]


@pytest.mark.slow
def test_however_they_end_none_waits_for_ever(world: Any, start: Start, tmp_path: Path) -> None:
    """The end of a group of gloo's waits for threads that may wait for Python's lock: one in forty ends was none."""
    for turn in range(60):
        (tmp_path / f"run{turn}").mkdir()
        (tmp_path / f"run{turn}" / "precious.txt").write_text("not a run")
        commands = start_two(start, world.arguments(tmp_path / f"run{turn}", *SETS, "steps=5"))
        assert [command.wait() for command in commands] == [64, 75]


def test_before_the_end_it_waits_for_whoever_holds_a_message() -> None:
    processes = Processes(0, 1, torch.device("cpu"))
    held = [processes._noted(torch.zeros(1)) for _ in range(3)]
    threading.Timer(0.2, held.clear).start()
    began_s = time.monotonic()
    processes.rest()
    assert 0.15 < time.monotonic() - began_s < 5
    assert not held


def test_where_one_is_killed_the_other_ends_and_says_so(
    world: Any, start: Start, events: Events, tmp_path: Path
) -> None:
    commands = start_two(start, world.arguments(tmp_path / "run", *SETS, "steps=500"))
    commands[0].wait_for(lambda: len(events(tmp_path / "run", "step")) >= 2)
    commands[1].signal(signal.SIGKILL)
    assert commands[0].wait() == 75
    assert "another process of this run ended" in commands[0].errors()[-1]


def test_an_error_of_the_first_ends_all(world: Any, start: Start, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("not a run")
    commands = start_two(start, world.arguments(tmp_path / "run", *SETS, "steps=5"))
    assert [command.wait() for command in commands] == [64, 75]
    assert "is not empty and no run" in commands[0].errors()[-1]
    assert commands[1].errors()[-1] == "stopped: process 1: the first process could not open the run"


def test_micro_batches_that_cannot_be_shared_are_refused(world: Any, start: Start, tmp_path: Path) -> None:
    commands = start_two(start, world.arguments(tmp_path / "run", "accumulation=3", "steps=5"))
    assert [command.wait() for command in commands] == [64, 64]
    assert "accumulation 3 is not a multiple of 2 processes" in commands[0].errors()[-1]


def test_one_process_sends_no_message() -> None:
    with joined("cpu") as processes:
        assert (processes.index, processes.count, processes.group) == (0, 1, None)
        assert not torch.distributed.is_initialized()
        module = torch.nn.Linear(1, 1)
        assert processes.wrap(module) is module
        assert processes.any(True)
        assert not processes.any(False)
        assert float(processes.mean(torch.tensor(3.0))) == 3.0


def test_a_device_for_each_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="name its kind alone, or auto"), joined("cuda:1"):
        pass


def test_a_launcher_that_begins_one_process_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined("cpu"):
        assert "torchrun begins several" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_under_a_real_launcher(world: Any, events: Events, whole: Path, tmp_path: Path, launcher: str) -> None:
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    # `accelerate launch --cpu` needs to be told of a second machine to begin more than one process, so its other way:
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
    if launcher == "accelerate" and torch.cuda.device_count() < 2:
        pytest.skip("accelerate launch begins several processes on GPUs alone")
    begin = [*torchrun, str(free_port())] if launcher == "torchrun" else accelerate
    code = "import sys; from trainer.cli import train_expert; train_expert()"
    script = tmp_path / "train.py"
    script.write_text(code)
    arguments = world.arguments(run, *SETS, "steps=6")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([*begin, str(script), *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(run, whole, events)
    assert json.loads((run / "checkpoints" / "latest.json").read_text())["step"] == 6
