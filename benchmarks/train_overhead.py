"""What the trainer adds to a bare loop, alone and two at once on one store.

`python -m benchmarks.train_overhead [--json FILE] [--cores 0,1]`. The same UNet, AdamW, clipping and average: the
trainer reads a store of random records, the bare loop has its batch in memory. They take turns, so that a busy machine
slows both, and the median of the ratios of neighbouring rounds is told, by the clock and in CPU time. Two at once: two
processes of each kind, each on a core of its own; memory is that of each process alone.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.bare_loop import BareLoop
from benchmarks.train_world import SHAPES, World, write_world
from shared.runlog import read_events
from trainer.loop import train_expert

SAMPLES = 64
BATCH = 2
LOG_EVERY = 10  # steps, as by default
WARM_UP_STEPS = LOG_EVERY  # of each round, not counted


@dataclass(frozen=True)
class Reached:
    """What a round told."""

    per_s: float  # steps, in the median of LOG_EVERY at a time
    wait_share: float
    cpu_s: float  # of the whole process for a step, its start and end taken off


class Trainer:
    """A run that is gone on with, some steps at a time."""

    def __init__(self, world: World, output: Path) -> None:
        self._world, self._output, self._done = world, output, 0

    def round(self, steps: int) -> Reached:
        """`steps` steps, as the run logs them; a run of the warm-up alone before it tells what starting costs."""
        start_s = self._run(WARM_UP_STEPS)
        first = self._done + WARM_UP_STEPS
        cpu_s = self._run(WARM_UP_STEPS + steps) - start_s
        logged = [event for event in read_events(self._output / "events.jsonl") if event["event"] == "step"]
        counted = [event for event in logged if event["step"] > first]
        rates = [event["samples_per_s"] / BATCH for event in counted]
        return Reached(median(rates), median(event["data_wait_share"] for event in counted), cpu_s / steps)

    def _run(self, steps: int) -> float:
        self._done += steps
        began_s = time.process_time()
        sets = (f"steps={self._done}", f"batch={BATCH}", "accumulation=1", f"log.every={LOG_EVERY}")
        train_expert(self._world.request(self._output, "cpu", *sets))
        return time.process_time() - began_s


class Bare:
    """The bare loop, some steps at a time."""

    def __init__(self, world: World) -> None:
        self._loop = BareLoop(world.folder / "model" / "unet", world.shape, BATCH, 1, torch.device("cpu"))

    def round(self, steps: int) -> Reached:
        """`steps` steps after a warm-up; no data is waited for."""
        for _ in range(WARM_UP_STEPS):
            self._loop.step()
        rates, began_s = [], time.process_time()
        for _ in range(steps // LOG_EVERY):
            began = time.perf_counter()
            for _ in range(LOG_EVERY):
                self._loop.step()
            rates.append(LOG_EVERY / (time.perf_counter() - began))
        return Reached(median(rates), 0.0, (time.process_time() - began_s) / (len(rates) * LOG_EVERY))


def measure_alone(world: World, folder: Path, rounds: int, steps: int) -> dict[str, float]:
    """Time of the trainer's step and of the bare loop's, their ratios, and the share of waiting for data."""
    trainer, bare = Trainer(world, folder / "alone"), Bare(world)
    pairs: list[tuple[Reached, Reached]] = []
    for number in range(rounds):
        if number % 2:  # neither is always the one that comes after
            ours = trainer.round(steps)
            pairs.append((ours, bare.round(steps)))
        else:
            theirs = bare.round(steps)
            pairs.append((trainer.round(steps), theirs))
    return {
        "trainer_step_s": median(1 / ours.per_s for ours, _ in pairs),
        "bare_step_s": median(1 / theirs.per_s for _, theirs in pairs),
        "ratio": median(theirs.per_s / ours.per_s for ours, theirs in pairs),
        "cpu_ratio": median(ours.cpu_s / theirs.cpu_s for ours, theirs in pairs),
        "data_wait_share": median(ours.wait_share for ours, _ in pairs),
    }


def measure_two(world: World, folder: Path, rounds: int, steps: int, cores: Sequence[int]) -> dict[str, float]:
    """Two trainers at once on one store against two bare loops at once, and memory of each process's own."""
    context = multiprocessing.get_context("spawn")
    ends: dict[str, list[Connection]] = {"trainer": [], "bare": []}
    processes = []
    for kind, own in ends.items():
        for core in cores:
            here, there = context.Pipe()
            given = (kind, world, folder / f"two-{core}", core, steps, there)
            processes.append(context.Process(target=_work, args=given))
            processes[-1].start()
            own.append(here)
    rounds_of: dict[str, list[dict[str, float]]] = {"trainer": [], "bare": []}
    for _ in range(rounds):
        for kind, own in ends.items():
            for end in own:
                end.send("go")
            told = [end.recv() for end in own]
            rounds_of[kind].append({key: sum(one[key] for one in told) / len(told) for key in told[0]})
    for end in (end for own in ends.values() for end in own):
        end.send("stop")
    for process in processes:
        process.join()
    pairs = list(zip(rounds_of["trainer"], rounds_of["bare"], strict=True))
    return {
        "ratio": median(bare["per_s"] / ours["per_s"] for ours, bare in pairs),
        "cpu_ratio": median(ours["cpu_s"] / bare["cpu_s"] for ours, bare in pairs),
        "data_wait_share": median(ours["wait_share"] for ours, _ in pairs),
        "private_trainer_mib": max(ours["private_mib"] for ours, _ in pairs),
        "private_bare_mib": max(bare["private_mib"] for _, bare in pairs),
        "private_more_mib": pairs[-1][0]["private_mib"] - pairs[-1][1]["private_mib"],
    }


def _work(kind: str, world: World, output: Path, core: int, steps: int, end: Connection) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    way: Any = Trainer(world, output) if kind == "trainer" else Bare(world)
    while end.recv() == "go":
        end.send(asdict(way.round(steps)) | {"private_mib": _private_mib()})


def _private_mib() -> float:
    """Memory of this process alone; what maps a file is left out, as others may map it too."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep the numbers where --json says."""
    parser = argparse.ArgumentParser(prog="benchmarks.train_overhead", description="What the trainer adds to a loop.")
    parser.add_argument("--shapes", default="tiny,20M", help="of the UNet (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=40, help="in a round, in tens (default: %(default)s)")
    parser.add_argument("--cores", default="", metavar="A,B", help="measure two at once too, on these cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the numbers")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in options.shapes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            world = write_world(Path(folder), SHAPES[name], SAMPLES)
            alone = measure_alone(world, Path(folder), options.rounds, options.steps)
            results[name] = {"alone": alone}
            print(
                f"{name}: trainer / bare {alone['ratio']:.3f}, in CPU time {alone['cpu_ratio']:.3f} "
                f"({alone['trainer_step_s'] * 1e3:.1f} ms against "
                f"{alone['bare_step_s'] * 1e3:.1f}), waits for data {alone['data_wait_share']:.2%}"
            )
            if options.cores:
                cores = [int(core) for core in options.cores.split(",")]
                two = results[name]["two"] = measure_two(world, Path(folder), options.rounds, options.steps, cores)
                print(
                    f"  two at once: {two['ratio']:.3f}, in CPU time {two['cpu_ratio']:.3f}, "
                    f"memory of each {two['private_trainer_mib']:.0f} MiB against "
                    f"{two['private_bare_mib']:.0f}: {two['private_more_mib']:+.0f}"
                )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
