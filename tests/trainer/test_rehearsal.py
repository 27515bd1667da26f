"""`train-expert --dry-run`: what it says is what then happens, and it leaves nothing behind."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shared.errors import ConfigError, StoreFull
from trainer.cli import _train_expert
from trainer.loop import train_expert
from trainer.rehearsal import Rehearsal, rehearse, require_room

Events = Callable[..., list[dict[str, Any]]]


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "lock.mdb"}


def test_it_foretells_the_run_and_writes_nothing(world: Any, tmp_path: Path, events: Events) -> None:
    own = world.copy(tmp_path / "store")
    request = own.request(tmp_path / "run", "steps=44", "batch=2", "accumulation=2", "eval.samples=0")
    before = files(tmp_path)
    told = rehearse(request)
    assert files(tmp_path) == before
    train_expert(request)
    last = events(tmp_path / "run", "step")[-1]
    assert int(told.epochs - 1e-9) == last["epoch"]
    assert told.samples == told.samples_in_manifest == sum(told.buckets.values()) == 43
    saved = next((tmp_path / "run" / "checkpoints").glob("step-*44"))
    assert told.checkpoint_bytes == pytest.approx(
        sum(f.stat().st_size for f in saved.rglob("*") if f.is_file()), rel=0.1
    )
    assert told.step_s is not None
    assert told.left_s == pytest.approx(44 * told.step_s)
    again = rehearse(replace(request, config=own.config("steps=50", "batch=2", "accumulation=2", "eval.samples=0")))
    assert again.goes_on_after == 44


def test_less_is_trained_where_less_is_asked(world: Any, tmp_path: Path) -> None:
    whole = rehearse(world.request(tmp_path / "run"), with_timing=False)
    some = rehearse(world.request(tmp_path / "run", "trainable=['attention']"), with_timing=False)
    assert whole.parameters_trained == whole.parameters == some.parameters
    assert 0 < some.parameters_trained < whole.parameters_trained
    assert some.memory_bytes < whole.memory_bytes
    assert some.checkpoint_bytes < whole.checkpoint_bytes
    assert whole.step_s is None


def test_steps_within_the_backward_pass_are_timed_and_counted_too(world: Any, tmp_path: Path) -> None:
    fused = ("precision=bf16-lean", "optimizer.fused_backward=true", "optimizer.clip_norm=0")
    told = rehearse(world.request(tmp_path / "run", *fused))
    assert told.step_s
    after = rehearse(world.request(tmp_path / "run", fused[0]), with_timing=False)
    assert told.memory_bytes < after.memory_bytes


def test_it_refuses_what_the_run_would(world: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no data set 'photo'"):
        rehearse(world.request(tmp_path / "run", "data.keep.datasets=['photo']"), with_timing=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(ConfigError, match="is not empty and no run"):
        rehearse(world.request(tmp_path / "other"), with_timing=False)
    report = rehearse(world.request(tmp_path / "run"), with_timing=False)
    require_room(report, tmp_path)
    with pytest.raises(StoreFull, match="of checkpoints would be kept, 5 B are free"):
        require_room(replace(report, bytes_free=5), tmp_path)


def test_people_and_programs_are_told_the_same(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from shared.command import run_command

    for flags in (["--json"], []):
        with pytest.raises(SystemExit) as ended:
            run_command(
                _train_expert,
                [*world.arguments(tmp_path / "run", "loss.offset_noise=0.1", expert="refiner"), "--dry-run", *flags],
            )
        assert ended.value.code == 0
    first, *lines = capsys.readouterr().out.splitlines()
    facts = json.loads(first)
    assert lines[0] == "refiner: timesteps [0, 350), begins, 4 steps"
    assert lines[1].startswith("samples      43 of 43; buckets ")
    assert f"{facts['parameters_trained'] / 1e6:.2f} M trained" in lines[3]
    assert lines[-1].startswith("note: ")
    assert not (tmp_path / "run").exists()
    assert isinstance(Rehearsal(**{key: value for key, value in facts.items() if key != "left_s"}), Rehearsal)
