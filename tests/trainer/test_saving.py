"""When a run is saved, and that days of training outlive a full disk."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.runlog import RunLog, read_events
from trainer.checkpoint import newest_checkpoint
from trainer.config import CheckpointConfig
from trainer.loop import train_expert
from trainer.saving import SaveTurns

Events = Callable[..., list[dict[str, Any]]]


def test_steps_or_minutes_whichever_comes_first() -> None:
    now_s = [0.0]
    turns = SaveTurns(CheckpointConfig(every=10, every_minutes=2), lambda: now_s[0])
    taken = []
    for done in range(1, 31):
        now_s[0] += 19.0 if done < 16 else 1.0  # 7 steps are more than two minutes, later none are
        if turns.is_turn(done):
            taken.append(done)
    assert taken == [7, 10, 20, 30]


@pytest.fixture
def small_files() -> Any:
    """No file of this process grows beyond 60 KB meanwhile: a checkpoint finds no room, a line of the log does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before if size is None else (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_without_room_is_told_and_the_run_goes_on(
    world: Any, events: Events, tmp_path: Path, small_files: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    run, write = tmp_path / "run", RunLog.write

    def fill_after(log: RunLog, event: str, **fields: Any) -> None:
        write(log, event, **fields)
        if event == "step":  # the disk is full while step 4 is saved, and free again after
            small_files(60_000 if fields["step"] == 4 else None)

    monkeypatch.setattr(RunLog, "write", fill_after)
    train_expert(world.request(run, "steps=8", "checkpoint.every=2", "eval.samples=0"))
    assert [event["step"] for event in events(run, "checkpoint")] == [2, 6, 8]
    (unsaved,) = events(run, "unsaved")
    assert unsaved["step"] == 4
    assert "WARNING: step 4 is not saved: " in capfd.readouterr().err
    assert not list((run / "checkpoints").glob(".*"))
    newest = newest_checkpoint(run, print)
    assert newest is not None
    assert newest.state.step == 8


def test_a_last_checkpoint_without_room_ends_with_74_and_loses_nothing_before(
    world: Any, events: Events, start: Callable[..., Any], files_of: Any, tmp_path: Path
) -> None:
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    train_expert(world.request(run, "steps=2", "eval.samples=0"))
    limited = start("train-expert", world.arguments(run, "steps=4", "eval.samples=0"), environment={"LIMIT": "60000"})
    assert limited.wait() == 74
    assert "safetensors cannot be written" in limited.errors()[-1]
    assert [event["step"] for event in events(run, "checkpoint")] == [2]
    train_expert(world.request(run, "steps=4", "eval.samples=0"))
    train_expert(world.request(unbroken, "steps=4", "checkpoint.every=4", "eval.samples=0"))
    assert (
        files_of(run, 4)["unet/diffusion_pytorch_model.safetensors"]
        == (files_of(unbroken, 4)["unet/diffusion_pytorch_model.safetensors"])
    )


def test_events_that_find_no_room_are_written_when_there_is(tmp_path: Path, small_files: Any, capfd: Any) -> None:
    log = RunLog(tmp_path / "events.jsonl")
    log.write("begin", text="x" * 1000)
    small_files(1200)
    for step in range(3):
        log.write("step", step=step, text="y" * 500)
    small_files(None)
    log.write("end")
    log.close()
    assert capfd.readouterr().err.count("events are not written just now") == 1
    kinds = [event["event"] for event in read_events(tmp_path / "events.jsonl")]
    assert kinds[0] == "begin"
    assert kinds[-1] == "end"
    assert all(json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines())
