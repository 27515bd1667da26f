"""`evaluate-experts --watch`: rounds as checkpoints appear, what is not there, what rotation removes, SIGTERM."""

import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from shared.errors import ConfigError
from trainer import watch as watch_module
from trainer.evaluate import EvaluateRequest
from trainer.gallery import PictureWish
from trainer.report import read_report
from trainer.watch import room_bytes, watch

Pair = tuple[Path, Path]


@pytest.fixture
def runs(pair: Pair, tmp_path: Path) -> Pair:
    """Where the runs of the pair will stand, which have not begun."""
    return tmp_path / "base", tmp_path / "refiner"


@pytest.fixture
def request_of(world: Any, runs: Pair, tmp_path: Path) -> EvaluateRequest:
    return EvaluateRequest(
        runs, world.store, world.model, tmp_path / "out", device="cpu", draws=2, pictures=PictureWish(held_out=0)
    )


def arguments(request: EvaluateRequest) -> list[str]:
    options = {"--store": request.store, "--model": request.model, "--out": request.out, "--draws": 2}
    options |= {"--held-out": 0, "--max-share": 1, "--device": "cpu"}
    experts = [part for run in request.experts for part in ("--expert", str(run))]
    return [*experts, *(str(part) for option in options.items() for part in option), "--watch"]


def test_runs_are_judged_as_they_come_and_a_stop_leaves_what_there_is(
    request_of: EvaluateRequest, runs: Pair, pair: Pair, start: Callable[..., Any]
) -> None:
    """Neither run is there; then the base; SIGTERM; then the refiner, and the same command goes on to the end."""
    command = start("evaluate-experts", arguments(request_of))
    command.wait_for(lambda: any("not started" in line for line in command.errors()))
    shutil.copytree(pair[0], runs[0])
    command.wait_for(lambda: (request_of.out / "report.html").exists())
    command.signal(signal.SIGTERM)
    assert command.wait() == 75
    report = read_report(request_of.out)
    assert report is not None
    assert [(one.name, one.state, one.step) for one in report.rounds[0].experts] == [
        ("base", "judged", 2),
        ("refiner", "not started", None),
    ]
    assert "not started" in (request_of.out / "report.html").read_text()
    shutil.copytree(pair[1], runs[1])
    watch(request_of, 1.0, pause_s=0.01)
    report = read_report(request_of.out)
    assert report is not None
    assert [[one.step for one in round_.experts] for round_ in report.rounds] == [[2, None], [2, 2]]
    assert len(report.rounds[1].choices) == 4
    assert "Round by round" in (request_of.out / "report.html").read_text()
    assert not (request_of.out / ".held").exists()


def test_a_checkpoint_that_is_removed_while_it_is_judged_is_held(
    request_of: EvaluateRequest, runs: Pair, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    for own, run in zip(pair, runs, strict=True):
        shutil.copytree(own, run)
    judge = watch_module.judge

    def removing(*given: Any) -> Any:
        shutil.rmtree(runs[0] / "checkpoints")
        return judge(*given)

    monkeypatch.setattr(watch_module, "judge", removing)
    watch(request_of, 1.0, pause_s=0.01)
    report = read_report(request_of.out)
    assert report is not None
    assert [one.step for one in report.rounds[0].experts] == [2, 2]


def test_what_a_killed_watch_held_is_let_go(request_of: EvaluateRequest, runs: Pair, pair: Pair, start: Any) -> None:
    """Links keep the weights of checkpoints on the disk that rotation has removed: the next watch takes them away."""
    for own, run in zip(pair, runs, strict=True):
        shutil.copytree(own, run)
    held = request_of.out / ".held"
    command = start("evaluate-experts", arguments(request_of))
    command.wait_for(held.exists)
    command.signal(signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL
    assert held.exists()
    for run in runs:
        shutil.rmtree(run)  # so that there is nothing to judge
    command = start("evaluate-experts", arguments(request_of), "again.txt")
    command.wait_for(lambda: any("not started" in line for line in command.errors()))
    assert not held.exists()


def test_what_was_removed_before_it_could_be_held_is_passed_over_for_the_next(
    request_of: EvaluateRequest, runs: Pair, pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for own, run in zip(pair, runs, strict=True):
        shutil.copytree(own, run)
    open_bench, times = watch_module.open_bench, []

    def removing(*given: Any) -> Any:
        times.append(1)
        if len(times) == 1:
            [own] = (runs[0] / "checkpoints").glob("step-*")
            own.rename(runs[0] / "away")
            threading.Timer(0.2, lambda: (runs[0] / "away").rename(own)).start()
            raise FileNotFoundError(own)
        return open_bench(*given)

    monkeypatch.setattr(watch_module, "open_bench", removing)
    watch(request_of, 1.0, pause_s=0.01)
    assert "was removed meanwhile" in capsys.readouterr().err
    report = read_report(request_of.out)
    assert report is not None
    assert [one.step for one in report.rounds[-1].experts] == [2, 2]


def test_rounds_take_no_more_than_their_share(
    request_of: EvaluateRequest, runs: Pair, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    for own, run in zip(pair, runs, strict=True):
        shutil.copytree(own, run)
    rests: list[float] = []
    monkeypatch.setattr(watch_module, "_rest", lambda seconds, stop: rests.append(seconds))
    began_s = time.perf_counter()
    watch(request_of, 0.25, ("tensorboard",))
    assert list((request_of.out / "tensorboard").rglob("events.*"))
    took_s = time.perf_counter() - began_s
    assert 0 < rests[0] <= 3 * took_s
    report = read_report(request_of.out)
    assert report is not None
    assert rests[0] >= 3 * report.rounds[0].took_s


def test_the_room_of_a_round_is_that_of_fp32_however_it_is_saved(tiny_model: Path, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    shutil.copytree(tiny_model / "unet", whole)
    half.mkdir()
    tensors = load_file(whole / "diffusion_pytorch_model.safetensors")
    save_file({name: own.half() for name, own in tensors.items()}, half / "diffusion_pytorch_model.safetensors")
    shutil.copy(half / "diffusion_pytorch_model.safetensors", whole / "diffusion_pytorch_model.fp16.safetensors")
    weights_bytes = sum(own.numel() * 4 for own in tensors.values())
    assert room_bytes([half]) == room_bytes([whole]) == room_bytes([half, tmp_path / "removed"])
    assert room_bytes([half]) == int(1.5 * weights_bytes)


def test_what_cannot_be_followed_is_named(request_of: EvaluateRequest, pair: Pair, runs: Pair) -> None:
    [checkpoint] = (pair[0] / "checkpoints").glob("step-*")
    with pytest.raises(ConfigError, match="is one checkpoint"):
        watch(replace(request_of, experts=(checkpoint, pair[1])), 1.0)
    for own, run in zip(pair, runs, strict=True):
        shutil.copytree(own, run)
    watch(request_of, 1.0)
    (runs[0] / "config.toml").write_text("steps = 9")  # more to come
    report = read_report(request_of.out)
    assert report is not None
    (request_of.out / "report.json").write_text(report.model_copy(update={"rounds": []}).model_dump_json())
    with pytest.raises(ConfigError, match="another draws: name another --out"):
        watch(replace(request_of, draws=3), 1.0)
