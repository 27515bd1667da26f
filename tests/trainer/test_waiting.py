"""A trainer that is started before its store waits, is stopped while it waits, and trains once something is there."""

import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.errors import ConfigError
from trainer.waiting import wait_for_manifest, wait_for_store


def test_it_waits_for_the_first_build_and_then_trains(
    world: Any, start: Callable[..., Any], events: Callable[..., Any], tmp_path: Path
) -> None:
    own = world.copy(tmp_path / "ready")
    later = tmp_path / "store"
    arguments = [str(later) if part == str(world.store) else part for part in world.arguments(tmp_path / "run")]
    stopped = start("train-expert", [*arguments, "--wait"], "stopped.txt")
    stopped.wait_for(lambda: bool(stopped.errors()))
    assert stopped.errors() == [f"waiting for manifest 'main' in {later}"]
    stopped.signal(signal.SIGTERM)
    assert stopped.wait() == 75
    assert stopped.errors()[-1] == f"stopped: no manifest 'main' in {later} yet; the same command waits again"

    waiting = start("train-expert", [*arguments, "--wait", "--set", "steps=1", "--set", "batch=1"], "waiting.txt")
    waiting.wait_for(lambda: bool(waiting.errors()))
    shutil.move(own.store, later)
    assert waiting.wait() == 0, waiting.errors()
    assert len(events(tmp_path / "run", "step")) == 1


def test_what_is_there_is_not_waited_for_and_what_is_damaged_is_told_by_whoever_opens_it(
    world: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wait_for_manifest(world.store, "main", pause_s=100)
    assert capfd.readouterr().err == ""
    own = world.copy(tmp_path / "store")
    (own.store / "manifests" / "main" / "current.json").write_text("{")
    wait_for_manifest(own.store, "main", pause_s=100)
    with pytest.raises(ConfigError, match="manifest name"):
        wait_for_manifest(own.store, "../main", pause_s=100)


def test_a_watch_waits_for_its_store(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "store").mkdir()
    threading.Timer(0.2, (tmp_path / "store/store.json").touch).start()
    wait_for_store(tmp_path / "store", pause_s=0.02)
    wait_for_store(tmp_path / "store", pause_s=100)
    assert capfd.readouterr().err.splitlines() == [f"waiting for a store at {tmp_path}/store"]


def test_another_name_is_waited_for_and_said(world: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    own = world.copy(tmp_path / "store")
    manifests = own.store / "manifests"
    threading.Timer(0.2, lambda: shutil.copytree(manifests / "main", manifests / "mine")).start()
    wait_for_manifest(own.store, "mine", pause_s=0.02)
    assert capfd.readouterr().err.splitlines() == [f"waiting for manifest 'mine' in {own.store} (there are: main)"]
