"""The main job on the small world, command by command as users type it: pictures, store, two experts, images.

`python -m demo.main_job OUT` (make demo). Run again it goes on with what is there; nothing is encoded or trained twice.
"""

import os
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

CONFIGS = Path("configs/demo")
PROMPTS = ("a red circle left of a blue square on sand", "a small green triangle on white")
COUNT = 512
SIZES = ("112x112", "96x128", "128x96")  # the buckets of configs/demo/cache.toml


def main(out: Path) -> int:
    """Run the whole job in `out`; returns the exit code of the first command that fails, or 0."""
    started_s = time.monotonic()
    pictures, model, store = out / "pictures", out / "model", out / "store"
    one_after_another = [
        [sys.executable, "-m", "demo.shapes", str(pictures), "--count", str(COUNT), *_sizes()],
        [sys.executable, "-m", "demo.tiny_model", str(model)],
        ["cache-build", str(pictures), "--store", str(store), "--model", str(model), *_configs("cache")],
    ]
    for command in one_after_another:
        if code := _start(command).wait():
            return code

    print("\nboth experts at once, each on its own timesteps, from one store:", flush=True)
    share = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2))}
    runs = {name: out / "runs" / name for name in ("base", "refiner")}
    common = ["--store", str(store), "--model", str(model)]
    trainers = [
        _start(["train-expert", *_configs("expert", name), *common, "--output", str(run)], share)
        for name, run in runs.items()
    ]
    if code := max(trainer.wait() for trainer in trainers):
        return code

    experts = [part for run in runs.values() for part in ("--expert", str(run))]
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    images = out / "images"
    size = ["--width", "112", "--height", "112"]
    if code := _start(
        ["generate-images", *experts, "--model", str(model), *prompts, *size, "--out", str(images)]
    ).wait():
        return code
    _say_where(images, store, runs, time.monotonic() - started_s)
    return 0


def _sizes() -> list[str]:
    return [part for size in SIZES for part in ("--size", size)]


def _configs(*names: str) -> list[str]:
    return [part for name in names for part in ("--config", str(CONFIGS / f"{name}.toml"))]


def _start(command: list[str], environment: dict[str, str] | None = None) -> "subprocess.Popen[bytes]":
    shown = ["python" if part == sys.executable else part for part in command]
    print(f"$ {shlex.join(shown)}", flush=True)
    scripts = Path(sys.executable).parent  # the environment's own console scripts, whatever PATH says
    program = command[0] if command[0] == sys.executable else str(scripts / command[0])
    return subprocess.Popen([program, *command[1:]], env={**os.environ, **(environment or {})})


def _say_where(images: Path, store: Path, runs: dict[str, Path], elapsed_s: float) -> None:
    peak_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(
        "\ndone. The model began with random weights, so the pictures show that everything fits, not what it can draw."
    )
    for name, path in (("images", images), ("store", store), *runs.items()):
        print(f"  {name:9} {path.resolve()}")
    print(f"  curves    .venv/bin/tensorboard --logdir {runs['base'].parent}")
    print(f"  took {elapsed_s:.0f} s, largest process {peak_bytes >> 20} MiB")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out")))
