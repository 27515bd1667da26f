"""Which checkpoints stay: the newest and the best, whatever dies when and whatever is damaged."""

import contextlib
import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.errors import CheckpointError
from trainer import rotation
from trainer.checkpoint import open_checkpoint, open_expert
from trainer.loop import train_expert
from trainer.rotation import best_checkpoints, checkpoint_name, list_checkpoints, rotate, write_score

FREELY = ("eval.share=1", "eval.samples=4")


def save(run: Path, step: int, score: float | None, keep: int = 2, keep_best: int = 1) -> None:
    """What save_checkpoint does around the renaming, with little in the folder."""
    parent = run / "checkpoints"
    (parent / f".saving-{step}").mkdir(parents=True)
    for name in ("optimizer.safetensors", "state.json"):
        (parent / f".saving-{step}" / name).write_text("x")
    sums = {"optimizer.safetensors": {}, "state.json": {}}
    (parent / f".saving-{step}" / "checksums.json").write_text(json.dumps(sums))
    write_score(run, step, score)
    (parent / f".saving-{step}").rename(parent / checkpoint_name(step))
    rotate(run, keep, keep_best)


def names(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in list_checkpoints(run))


def best(run: Path) -> Any:
    return json.loads((run / "checkpoints" / "best.json").read_text())


def test_the_best_stays_beside_the_newest(tmp_path: Path) -> None:
    losses = {1: 0.5, 2: 0.3, 3: 0.4, 4: None, 5: 0.35, 6: 0.6, 7: 0.2, 8: 0.25, 9: 0.9}
    stays = {1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [2, 4, 5], 6: [2, 5, 6], 7: [6, 7], 8: [7, 8], 9: [7, 8, 9]}
    for step, loss in losses.items():
        save(tmp_path, step, loss)
        assert names(tmp_path) == stays[step]
        lowest = min((losses[at], at) for at in stays[step] if losses[at] is not None)
        assert (best(tmp_path)["loss"], best(tmp_path)["step"]) == lowest
        assert set(best(tmp_path)["scores"]) == {checkpoint_name(at) for at in stays[step] if losses[at] is not None}
        with_optimizer = [p for p in list_checkpoints(tmp_path) if (p / "optimizer.safetensors").exists()]
        assert with_optimizer == list_checkpoints(tmp_path)[:2]
        for path in list_checkpoints(tmp_path):
            sums = json.loads((path / "checksums.json").read_text())
            assert ("optimizer.safetensors" in sums) == (path in with_optimizer)


@pytest.mark.parametrize(("keep_best", "stays"), [(0, [4, 5]), (1, [2, 4, 5]), (2, [1, 2, 4, 5])])
def test_as_many_of_the_best_as_asked(tmp_path: Path, keep_best: int, stays: list[int]) -> None:
    for step, loss in enumerate([0.2, 0.1, 0.7, 0.8, 0.9], start=1):
        save(tmp_path, step, loss, keep_best=keep_best)
    assert names(tmp_path) == stays


def test_without_scores_the_newest_stay_and_nothing_is_best(tmp_path: Path) -> None:
    for step in range(1, 5):
        save(tmp_path, step, None if step % 2 else float("nan"))
    assert names(tmp_path) == [3, 4]
    assert not (tmp_path / "checkpoints" / "best.json").exists()


def test_of_equal_ones_the_newest_is_best(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, 0.5)
    assert best(tmp_path)["step"] == 3
    assert names(tmp_path) == [2, 3]


@pytest.mark.parametrize("dies_at", range(8))
def test_a_kill_at_any_moment_loses_no_score(tmp_path: Path, dies_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every change of the disk in turn is the last one; the next save finds the best all the same."""
    for step, loss in ((1, 0.3), (2, 0.5), (3, 0.6)):
        save(tmp_path, step, loss)
    left = dies_at

    class Killed(Exception):
        pass

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return function(*args, **options)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(rotation, "write_atomically", dying(rotation.write_atomically))
        patched.setattr(rotation.os, "rename", dying(rotation.os.rename))
        patched.setattr(rotation.shutil, "rmtree", dying(rotation.shutil.rmtree))
        patched.setattr(rotation.Path, "rename", dying(rotation.Path.rename))
        patched.setattr(rotation.Path, "unlink", dying(rotation.Path.unlink))
        with contextlib.suppress(Killed):
            save(tmp_path, 4, 0.1)
    pointed = best(tmp_path)
    assert (tmp_path / "checkpoints" / pointed["path"]).is_dir()
    there = names(tmp_path)
    assert set(there) <= {1, 2, 3, 4}
    assert {2, 3} <= set(there) or {3, 4} <= set(there)
    shutil.rmtree(tmp_path / "checkpoints" / ".saving-4", ignore_errors=True)
    save(tmp_path, 5, 0.4)
    assert best(tmp_path)["step"] == (4 if 4 in there else 1)
    assert not list(tmp_path.glob("checkpoints/step-00000001")) or 4 not in there


def test_a_score_of_a_step_that_is_done_again_is_its_new_one(tmp_path: Path) -> None:
    save(tmp_path, 1, 0.5)
    write_score(tmp_path, 2, 0.1)  # and killed before it got its name
    assert best(tmp_path)["step"] == 1
    save(tmp_path, 2, None)
    save(tmp_path, 3, 0.6)
    assert best(tmp_path)["scores"] == {checkpoint_name(1): 0.5, checkpoint_name(3): 0.6}


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"scores": 3}', '{"scores": {"step-00000001": "low"}}'])
def test_a_damaged_list_of_scores_is_made_from_the_events(tmp_path: Path, content: str) -> None:
    lines = [{"event": "eval", "step": 1, "loss": 0.1, "loss_ema": 0.3}, {"event": "eval", "step": 2, "loss": 0.4}]
    lines += [{"event": "eval", "step": 3, "loss": None}, {"event": "step", "step": 3, "loss": 0.0}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "ev')
    for step, loss in ((1, 0.3), (2, 0.4), (3, None)):
        save(tmp_path, step, loss)
    (tmp_path / "checkpoints" / "best.json").write_text(content)
    assert [path.name for path in best_checkpoints(tmp_path)] == [checkpoint_name(1), checkpoint_name(2)]
    save(tmp_path, 4, 0.9)
    assert names(tmp_path) == [1, 3, 4]
    assert best(tmp_path)["loss"] == 0.3


@pytest.mark.parametrize("content", ["", "{", "[]", "7"])
def test_a_damaged_older_checkpoint_does_not_stop_saving(tmp_path: Path, content: str) -> None:
    save(tmp_path, 1, 0.1)
    save(tmp_path, 2, 0.2)
    (tmp_path / "checkpoints" / checkpoint_name(1) / "checksums.json").write_text(content)
    save(tmp_path, 3, 0.3)
    assert names(tmp_path) == [1, 2, 3]


def test_a_run_keeps_its_best_checkpoint(world: Any, events: Any, tmp_path: Path) -> None:
    """A rate that ruins the weights: the first checkpoint is the best, stays without its optimizer, and verifies."""
    run = tmp_path / "run"
    rate = "optimizer.learning_rate=0.3"
    train_expert(world.request(run, "steps=2", "checkpoint.keep=2", *FREELY))
    train_expert(world.request(run, "steps=10", "checkpoint.keep=2", rate, *FREELY))
    losses = {event["step"]: event["loss_ema"] for event in events(run, "eval")}
    assert list(losses) == [2, 4, 6, 8, 10]
    assert min(losses, key=lambda step: losses[step]) == 2
    assert names(run) == [2, 8, 10]
    assert (best(run)["step"], best(run)["path"], best(run)["loss"]) == (2, "step-00000002", losses[2])
    kept = open_checkpoint(run / "checkpoints" / "step-00000002")
    assert not (kept.path / "optimizer.safetensors").exists()
    assert open_expert(run).path.name == "step-00000010"
    by_name = run / "checkpoints" / "best.json"
    assert open_expert(by_name).path == kept.path
    (kept.path / "state.json").write_text("{}")
    assert open_expert(by_name).path.name == checkpoint_name(min((8, 10), key=lambda step: losses[step]))
    for step in (8, 10):
        (run / "checkpoints" / checkpoint_name(step) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has an eval loss and verifies"):
        open_expert(by_name)


@pytest.mark.parametrize(("kills", "steps"), [(1, 8), pytest.param(40, 60, marks=pytest.mark.slow)])
def test_killed_and_gone_on_with_the_best_is_the_same(
    world: Any, start: Callable[..., Any], tmp_path: Path, kills: int, steps: int
) -> None:
    """Saved and evaluated at every step, killed while it saves: best.json always names one that is there."""
    rate = "optimizer.learning_rate=0.05"
    sets = (f"steps={steps}", "batch=1", rate, "checkpoint.every=1", "checkpoint.keep=2", *FREELY)
    whole, broken, rng = tmp_path / "whole", tmp_path / "broken", random.Random(0)
    train_expert(world.request(whole, *sets))
    for _ in range(kills):
        command, before = start("train-expert", world.arguments(broken, *sets)), list_checkpoints(broken)
        command.wait_for(lambda before=before: list_checkpoints(broken)[:1] > before[:1])
        time.sleep(rng.uniform(0, 0.1))
        command.signal(signal.SIGKILL)
        command.wait()
        if (broken / "checkpoints" / "best.json").exists() and "path" in best(broken):
            assert (broken / "checkpoints" / best(broken)["path"]).is_dir()
    train_expert(world.request(broken, *sets))
    assert best(broken) == best(whole)
    assert names(broken) == names(whole)


def test_a_damaged_newest_one_takes_its_score_along(world: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_expert(world.request(run, "steps=4", "checkpoint.keep=2", *FREELY))
    path = run / "checkpoints" / "best.json"
    scores = best(run)["scores"] | {"step-00000004": 0.0}
    path.write_text(json.dumps({"format": 1, "scores": scores}))
    (run / "checkpoints" / "step-00000004" / "state.json").write_text("{")
    train_expert(world.request(run, "steps=3", "checkpoint.keep=2", *FREELY))
    assert "step-00000004" not in best(run)["scores"]
    assert best(run)["step"] in (2, 3)
