"""How long a user waits: for `--help`, and from the start of `train-expert` to its first optimizer step.

`python -m benchmarks.start_time [--json FILE]`. Each thing is done in processes of its own, in turns with what it is
measured against: a bare import of torch and diffusers' UNet, or Python alone. Processor time is told beside the clock,
since whatever else runs on the machine is not in it. Loading weights depends on the model and is left out: the process
loads them a second time and takes that off.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks.train_world import RECIPE, SHAPES, write_world

HELP = "import sys; from {module} import {name}; sys.argv = ['x', '--help']; {name}()"
COMMANDS = {
    "cache-build --help": ("cache_builder.cli", "cache_build"),
    "cache-store --help": ("cache_builder.cli", "cache_store"),
    "train-expert --help": ("trainer.cli", "train_expert"),
    "generate-images --help": ("trainer.cli", "generate_images"),
}
BARE_IMPORT = "import torch; from diffusers import UNet2DConditionModel"
# Ends at the first optimizer step, and says what loading the same weights again takes.
FIRST_STEP = """
import resource, sys, time
from trainer.cli import train_expert
import trainer.loop as loop, trainer.optim as optim
given, load = [], loop.load_trained
def remember(*arguments):
    given.append(arguments)
    return load(*arguments)
loop.load_trained = remember
step = optim.Optimizer.step_unless_bad
def processor_s():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
def end(self, is_bad):
    step(self, is_bad)
    began_s, began_cpu_s = time.perf_counter(), processor_s()
    load(*given[0])
    print(time.perf_counter() - began_s, processor_s() - began_cpu_s, flush=True)
    import os
    os._exit(0)
optim.Optimizer.step_unless_bad = end
train_expert()
"""


def run_python(code: str, arguments: Sequence[str] = ()) -> tuple[float, float, str]:
    """Seconds by the clock and of processor time that `code` took in a process of its own, and what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before, began_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=True
    )
    took_s, after = time.perf_counter() - began_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def measure_help(rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each command's help, by the clock and of processor time."""
    codes = {name: HELP.format(module=module, name=function) for name, (module, function) in COMMANDS.items()}
    return _in_turns({"python alone": ("", ()), **{name: (code, ()) for name, code in codes.items()}}, rounds)


def measure_first_step(rounds: int) -> dict[str, dict[str, float]]:
    """The same of a bare import and of the way to the first optimizer step, loading weights left out."""
    with tempfile.TemporaryDirectory() as name:
        world = write_world(Path(name), SHAPES["tiny"], 8)
        (world.folder / "model" / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}\n')
        paths = ["--store", str(world.folder / "store"), "--model", str(world.folder / "model"), "--device", "cpu"]
        sets = [part for one in (*RECIPE, "batch=2", "steps=5") for part in ("--set", one)]
        ways: dict[str, tuple[str, Sequence[str]]] = {"bare import": (BARE_IMPORT, ())}
        ways["first step"] = (FIRST_STEP, [*paths, "--output", str(Path(name) / "run"), *sets])
        return _in_turns(ways, rounds)


def _in_turns(ways: Mapping[str, tuple[str, Sequence[str]]], rounds: int) -> dict[str, dict[str, float]]:
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, (code, arguments) in ways.items():
            clock_s, processor_s, printed = run_python(code, arguments)
            if name == "first step":
                loading = [float(part) for part in printed.split()]
                clock_s, processor_s = clock_s - loading[0], processor_s - loading[1]
            if turn:  # the first fills the caches of files
                taken[name].append((clock_s, processor_s))
    return {name: {"s": median(s for s, _ in t), "processor_s": median(p for _, p in t)} for name, t in taken.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep the numbers where --json says."""
    parser = argparse.ArgumentParser(prog="benchmarks.start_time", description="Seconds until something happens.")
    parser.add_argument("--rounds", type=int, default=7, help="of each, in turns (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the numbers")
    options = parser.parse_args(arguments)
    results = measure_help(options.rounds) | measure_first_step(options.rounds)
    print(f"{'':24} {'clock':>8} {'processor':>10}")
    for name, of in results.items():
        print(f"{name:24} {of['s']:6.2f} s {of['processor_s']:8.2f} s")
    first, bare = results["first step"], results["bare import"]
    ratios = {key: first[key] / bare[key] for key in first}
    print(f"to the first step, of the bare import: {ratios['s']:.2f} by the clock, {ratios['processor_s']:.2f} in all")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
