"""The trainer's tests share one small store of real pictures, and processes that start in a tenth of a second."""

import json
import multiprocessing
import os
import runpy
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cache_builder.build import BuildOptions, build
from cache_builder.config import BuildConfig
from cache_builder.sources.folder import FolderSource
from shared.config import load_config
from shared.runlog import read_events
from tests.pictures import write_shapes
from trainer.config import ExpertConfig
from trainer.evaluate import EvaluateRequest, evaluate
from trainer.gallery import PictureWish
from trainer.loop import train_expert
from trainer.report import read_report
from trainer.run import Request

BUILD = ("images.resolution=64", "images.step=16", "split.eval_fraction=0.1")
TRAIN = ("steps=4", "batch=2", "checkpoint.every=2", "log.every=1", "log.trackers=[]", "ema.decay=0.9")
OBJECTIVE = (
    "optimizer.learning_rate=1e-3",
    "schedule.prediction_type=v_prediction",
    "schedule.zero_terminal_snr=true",
    "schedule.timestep_spacing=trailing",
)
RANGES = {"base": "{low=350, high=1000}", "refiner": "{low=0, high=350}", "whole": "{low=0, high=1000}"}
WORKER = Path(__file__).with_name("train_worker.py")
PATIENCE_S = 120


@dataclass(frozen=True)
class World:
    """A model, pictures, the store that was built of both, and how an expert is trained on them."""

    model: Path
    pictures: Path
    store: Path
    manifest: str = "main"

    def sets(self, expert: str, *sets: str) -> list[str]:
        return [f"name={expert}", f"timesteps={RANGES[expert]}", *TRAIN, *OBJECTIVE, *sets]

    def config(self, *sets: str, expert: str = "base") -> ExpertConfig:
        return load_config(ExpertConfig, [], self.sets(expert, *sets))

    def request(self, output: Path, *sets: str, expert: str = "base", move: str | None = None) -> Request:
        config = self.config(*sets, expert=expert)
        return Request(config, self.store, self.manifest, self.model, output, "cpu", move)

    def arguments(self, output: Path, *sets: str, expert: str = "base") -> list[str]:
        options = {"--store": self.store, "--model": self.model, "--output": output, "--manifest": self.manifest}
        flat = [str(part) for option in options.items() for part in option]
        return [*flat, "--device", "cpu", *(part for one in self.sets(expert, *sets) for part in ("--set", one))]

    def build(self, *sets: str, pictures: Path | None = None, manifest: str | None = None, **options: Any) -> str:
        """Build (more of) the store; returns the digest of the manifest."""
        config = load_config(BuildConfig, [], [*BUILD, *sets])
        source = FolderSource(pictures or self.pictures, "shapes", config.captions, config.images.max_bytes)
        where = BuildOptions(self.store, manifest or self.manifest, "cpu", **options)
        digest = build([source], self.model, config, where).digest
        assert digest is not None
        return digest

    def copy(self, folder: Path) -> "World":
        """The same world with a store of its own, to be damaged or added to."""
        shutil.copytree(self.store, folder)
        return replace(self, store=folder)


class Command:
    """A command in a process of its own."""

    def __init__(self, name: str, arguments: list[str], stderr: Path, environment: dict[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["diffusers.models.unets.unet_2d_condition", "trainer.loop", "trainer.cli", "cache_builder.build"]
        )
        self._stderr = stderr
        given = {"COMMAND": name, "ARGUMENTS": arguments, "STDERR": str(stderr), "ENVIRONMENT": environment}
        self.process = context.Process(target=runpy.run_path, args=(str(WORKER), given))
        self.process.start()

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        """The exit code; minus the signal where it died of one."""
        self.process.join(PATIENCE_S)
        assert self.process.exitcode is not None, f"still running after {PATIENCE_S} s: {self.errors()}"
        return self.process.exitcode

    def errors(self) -> list[str]:
        """Lines that it and those before it in the same place wrote to stderr."""
        return self._stderr.read_text().splitlines() if self._stderr.exists() else []

    def wait_for(self, is_so: Callable[[], bool]) -> None:
        """Return once `is_so`; fails where the process ends first."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not is_so():
            assert self.process.is_alive(), (self.process.exitcode, self.errors())
            assert time.monotonic() < deadline_s
            time.sleep(0.005)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Runs are compared bit for bit, here with those of other processes: all take one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def world(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """48 pictures in three buckets; tests must not write into it."""
    folder = tmp_path_factory.mktemp("world")
    world = World(tiny_model, write_shapes(folder / "shapes", 48), folder / "store")
    world.build()
    return world


@pytest.fixture(scope="session")
def pair(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Run folders of a base and of a refiner that have just begun to learn; tests must not write into them."""
    folder = tmp_path_factory.mktemp("pair")
    for expert in ("base", "refiner"):
        train_expert(world.request(folder / expert, "steps=2", "batch=1", "ema.decay=0.5", expert=expert))
    return folder / "base", folder / "refiner"


@pytest.fixture(scope="session")
def judge_in(world: Any, pair: tuple[Path, Path]) -> Callable[..., Any]:
    """Evaluates into a folder; returns the report."""

    def judged(out: Path, **changes: Any) -> Any:
        asked: dict[str, Any] = {"experts": pair, "store": world.store, "model": world.model, "out": out}
        asked |= {"device": "cpu", "draws": 12, "pictures": PictureWish(held_out=0)}
        torch.set_num_threads(1)  # also where a fixture of the session asks
        evaluate(EvaluateRequest(**(asked | changes)))
        return read_report(out)

    return judged


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts commands; those that still run at the end of the test are killed."""
    begun: list[Command] = []

    def begin(
        name: str, arguments: list[str], stderr: str = "stderr.txt", environment: dict[str, str] | None = None
    ) -> Command:
        begun.append(Command(name, arguments, tmp_path / stderr, environment or {}))
        return begun[-1]

    yield begin
    for command in begun:
        command.process.kill()
        command.process.join()
        command.process.close()


@pytest.fixture(scope="session")
def files_of() -> Callable[[Path, int], dict[str, str]]:
    """Digests of every file of one checkpoint of a run: equal where the runs are equal bit for bit."""

    def read(run: Path, step: int) -> dict[str, str]:
        sums = json.loads((run / "checkpoints" / f"step-{step:08d}" / "checksums.json").read_text())
        return {name: entry["sha256"] for name, entry in sums.items()}

    return read


@pytest.fixture(scope="session")
def events() -> Callable[..., list[dict[str, Any]]]:
    """Events of a run, of one kind where it is named."""

    def read(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
        return [event for event in read_events(run / "events.jsonl") if kind in (None, event["event"])]

    return read
