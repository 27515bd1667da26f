"""R25: a page that is killed or hangs, twenty times, while it is asked all the time, changes nothing for others."""

import itertools
import signal
import subprocess
import threading
import time
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import pytest

from shared.manifest import current_digest
from shared.runlog import read_events
from shared.store import StoreReader
from tests.dashboard.page_process import command, page
from tests.pictures import write_shapes

pytestmark = pytest.mark.slow
TIMES = 20
STEPS = 60
ADDRESSES = ("api/status", "api/runs", "api/events", "api/gallery", "metrics")


def build(store: Path, pictures: Path, model: Path) -> subprocess.Popen[bytes]:
    sets = ("--set", "images.resolution=64", "--set", "images.step=16", "--set", "encode.batch=1")
    return command(
        "cache_builder.cli", "cache_build", pictures, "--store", store, "--model", model, "--dataset", "shapes", *sets
    )


def train(store: Path, run: Path, model: Path, expert: str) -> subprocess.Popen[bytes]:
    timesteps = {"base": "{low=350, high=1000}", "refiner": "{low=0, high=350}"}[expert]
    said = [f"name={expert}", f"timesteps={timesteps}", f"steps={STEPS}", "batch=2", "log.every=1", "log.trackers=[]"]
    sets = [part for one in said for part in ("--set", one)]
    where = ["--store", store, "--model", model, "--output", run, "--device", "cpu"]
    return command("trainer.cli", "train_expert", *where, *sets)


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in read_events(run / "events.jsonl") if event["event"] == "step"]


def keys(store: Path) -> set[bytes]:
    with StoreReader(store) as reader:
        return {key for part in reader.sizes() for key, _ in part}


def all_together(folder: Path, model: Path, few: Path, many: Path) -> list[subprocess.Popen[bytes]]:
    """Two trainers on a sealed manifest, and a build that adds to its store."""
    assert build(folder / "store", few, model).wait(600) == 0
    first = [train(folder / "store", folder / expert, model, expert) for expert in ("base", "refiner")]
    until_s = time.monotonic() + 300
    while not all(losses(folder / expert) for expert in ("base", "refiner")) and time.monotonic() < until_s:
        time.sleep(0.1)
    return [*first, build(folder / "store", many, model)]


def harass(folder: Path) -> None:
    """Start pages, ask them all the time, stop each four times and then kill it."""
    for _ in range(TIMES // 5):
        with page(folder / "store", "--run", str(folder / "base"), "--run", str(folder / "refiner")) as (one, address):
            asking = threading.Thread(target=ask, args=(address, one), daemon=True)
            asking.start()
            for _ in range(4):
                time.sleep(0.15)
                one.send_signal(signal.SIGSTOP)
                time.sleep(0.1)
                one.send_signal(signal.SIGCONT)
            one.kill()
            asking.join()


def ask(address: str, one: subprocess.Popen[str]) -> None:
    for name in itertools.cycle(ADDRESSES):
        if one.poll() is not None:
            return
        with suppress(OSError, HTTPException), urlopen(address + name, timeout=2) as answer:
            answer.read()


def test_killed_and_hung_twenty_times(tiny_model: Path, tmp_path: Path) -> None:
    few, many = write_shapes(tmp_path / "few", 16), write_shapes(tmp_path / "many", 120)
    quiet, harassed = tmp_path / "quiet", tmp_path / "harassed"
    results = {}
    for folder in (quiet, harassed):
        folder.mkdir()
        working = all_together(folder, tiny_model, few, many)
        if folder == harassed:
            harass(folder)
            assert any(one.poll() is None for one in working), "all were done before the page was"
        results[folder] = [one.wait(900) for one in working]
    assert results[quiet] == results[harassed] == [0, 0, 0]
    for expert in ("base", "refiner"):
        assert len(losses(quiet / expert)) == STEPS
        assert losses(quiet / expert) == losses(harassed / expert)
    assert keys(quiet / "store") == keys(harassed / "store")
    assert current_digest(quiet / "store", "main") == current_digest(harassed / "store", "main")
