"""The main job on the small world, command by command as users type it: pictures, store, two experts, images, scores.

`python -m demo.main_job OUT` (make demo). Both experts begin with demo/model, learn their own timesteps at once, and
draw together; the same prompts are drawn by the start model alone, and all of it is judged. Run again it goes on with
what is there; nothing is encoded or trained twice.
"""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from demo.commands import run, start
from demo.prompts import PICTURE_HW, SIZES_HW

CONFIGS, MODEL = Path("configs/demo"), Path("demo/model")
COUNT = 1024
PROMPTS = 24  # of each set
DRAWING = ["--steps", "30", "--guidance", "2.5", "--height", str(PICTURE_HW[0]), "--width", str(PICTURE_HW[1])]


def main(out: Path) -> int:
    """Run the whole job in `out`; returns the exit code of the first command that fails, or 0."""
    started_s = time.monotonic()
    pictures, store, prompts = out / "pictures", out / "store", out / "prompts.txt"
    model = ["--model", str(MODEL)]
    sizes = [part for h, w in SIZES_HW for part in ("--size", f"{h}x{w}")]  # the buckets of configs/demo/cache.toml
    half = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2))}
    try:
        run([sys.executable, "-m", "demo.shapes", str(pictures), "--count", str(COUNT), *sizes])
        run([sys.executable, "-m", "demo.prompts", str(prompts), "--count", str(PROMPTS)])
        run(["cache-build", str(pictures), "--store", str(store), *model, *_configs("cache")])

        print("\nboth experts at once, each on its own timesteps, from one store:", flush=True)
        runs = {name: out / "runs" / name for name in ("base", "refiner")}
        common = ["--store", str(store), *model]
        _both(
            [
                ["train-expert", *_configs("expert", name), *common, "--output", str(path)]
                for name, path in runs.items()
            ],
            half,
        )

        print("\nthe same prompts from the same noise, by the pair and by the start model alone:", flush=True)
        experts = [part for path in runs.values() for part in ("--expert", str(path))]
        drawing = ["--prompts", str(prompts), *DRAWING]
        by_pair, by_start = out / "images" / "pair", out / "images" / "start"
        _both(
            [
                ["generate-images", *experts, *model, *drawing, "--out", str(by_pair)],
                [sys.executable, "-m", "demo.pipeline", str(MODEL), *drawing, "--out", str(by_start)],
            ],
            half,
        )
        run([sys.executable, "-m", "demo.report", str(out)])
    except subprocess.CalledProcessError as error:
        return error.returncode
    _say_where(out, runs, time.monotonic() - started_s)
    return 0


def _configs(*names: str) -> list[str]:
    return [part for name in names for part in ("--config", str(CONFIGS / f"{name}.toml"))]


def _both(commands: list[list[str]], environment: dict[str, str]) -> None:
    """Run commands at the same time; raises CalledProcessError once all have ended, if one failed."""
    processes = [start(command, environment) for command in commands]
    codes = [process.wait() for process in processes]
    for command, code in zip(commands, codes, strict=True):
        if code:
            raise subprocess.CalledProcessError(code, command)


def _say_where(out: Path, runs: dict[str, Path], elapsed_s: float) -> None:
    peak_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    for name in ("report.html", "images", "store", "runs"):
        print(f"  {name:12} {(out / name).resolve()}")
    print(f"  curves       .venv/bin/tensorboard --logdir {runs['base'].parent}")
    print(f"  took {elapsed_s:.0f} s, largest process {peak_bytes >> 20} MiB")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out")))
