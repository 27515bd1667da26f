"""Curves: several trackers at once, one run in each however often it goes on, and none that can end a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.errors import ConfigError
from trainer.loop import train_expert
from trainer.trackers import Curves

Events = Callable[..., list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_one_that_is_not_installed_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    curves = Curves(tmp_path, 0, ("wandb", "trackio"), "shapes", {})
    curves.log({"loss": 1.0}, 1)
    curves.close()
    said = capfd.readouterr().err.splitlines()
    assert said == [
        f"no curves in {name}: it is not installed (pip install 'sdxl-experts[{name}]')"
        for name in ("wandb", "trackio")
    ]


def test_one_that_fails_is_left_out_and_the_run_goes_on(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: Events, capfd: Any
) -> None:
    from accelerate.tracking import TensorBoardTracker

    def broken(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("the server has gone\nand more")

    monkeypatch.setattr(TensorBoardTracker, "log", broken)
    train_expert(world.request(tmp_path / "run", "log.trackers=['tensorboard']", "steps=3"))
    assert len(events(tmp_path / "run", "step")) == 3
    said = [line for line in capfd.readouterr().err.splitlines() if "no more curves" in line]
    assert said == ["no more curves in tensorboard: ConnectionError: the server has gone"]


def test_an_unknown_one_is_refused(world: Any) -> None:
    with pytest.raises(ConfigError, match=r"log.trackers.0: input should be 'tensorboard', 'wandb' or 'trackio'"):
        world.config("log.trackers=['mlflow']")


def test_wandb_offline_goes_on_with_one_run(world: Any, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for steps in ("steps=2", "steps=4"):
        train_expert(world.request(tmp_path / "run", "log.trackers=['wandb']", "log.project=shapes", steps))
    identity = (tmp_path / "run" / "tracker_id").read_text()
    runs = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert runs
    assert all(run.name.endswith(identity) for run in runs)
    assert all(list(run.glob("*.wandb")) for run in runs)
