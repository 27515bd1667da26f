"""Do two experts beat one? Trained, measured and drawn with on the small world, arm by arm and seed by seed.

`python -m benchmarks.experts_vs_one OUT [--steps 700] [--seeds 3] [--boundary 350 ...] [--kind full ...]`. Run again
it goes on: pictures, store, runs, losses and drawings that are in OUT are not made twice. OUT/results.json has all that
was measured; `python -m benchmarks.experts_table OUT/results.json` makes tables and intervals of it.

    demo.shapes, cache-build -> train-expert, run after run -> losses -> generate-images, judged -> results.json
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.experts_arms import KINDS, PREDICTIONS, RATES, Arm, Run, arms, variations
from benchmarks.experts_handover import handover_of
from benchmarks.experts_judge import losses_of, steps_of, stretches, verdicts_of
from demo.commands import run, start
from demo.prompts import PICTURE_HW, SIZES_HW
from shared.atomic import write_atomically

CONFIGS, MODEL = Path("configs/demo"), Path("demo/model")
CUTS = (200, 350, 500)  # boundaries that losses are cut at, whichever are trained
STEPS, GUIDANCE = 30, 2.5
DRAWING = ["--steps", str(STEPS), "--guidance", str(GUIDANCE)]
DRAWING += ["--height", str(PICTURE_HW[0]), "--width", str(PICTURE_HW[1])]
QUIET = ("log.trackers=[]", "eval.samples=0", "checkpoint.every=1000000", "checkpoint.keep_best=0")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure and draw what is missing, and write OUT/results.json."""
    options = _options(arguments)
    out: Path = options.out
    _make_world(out, options.pictures, options.prompts)
    asked = list(_asked(options))
    runs = list(dict.fromkeys(one for arm, _ in asked for one in arm.runs))
    _train(out, runs, options)
    results = {
        "settings": {
            key: str(value) if key == "model" else value for key, value in vars(options).items() if key != "out"
        },
        "start": {
            "losses": _losses(out, "start", runs[0], options, of_start=True),  # the first covers the whole schedule
            "pictures": _drawn_by_start(out, options.model),
        },
        "runs": {one.name: asdict(one) | {"losses": _losses(out, one.name, one, options)} for one in runs},
        "arms": [
            {
                "name": arm.name,
                "kind": kind,
                "seed": seed,
                "runs": [one.name for one in arm.runs],
                "pictures": _drawn(out, arm, options.model),
                "handover": {str(cut): _handed_over(out, arm.runs[-1], cut, options) for cut in _cuts(arm, options)},
            }
            for arm, (kind, seed) in asked
        ],
    }
    write_atomically(out / "results.json", json.dumps(results, indent=1).encode() + b"\n")
    print(f"{len(asked)} arms, {len(runs)} runs: {out / 'results.json'}")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.experts_vs_one", description="Do two experts beat one?")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to work in; what it holds is gone on with")
    parser.add_argument("--steps", type=int, default=700, help="optimizer steps of all experts of an arm together")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each arm")
    parser.add_argument("--boundary", type=int, nargs="+", default=[350], help="timesteps at which a pair hands over")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=["full"], help="what is trained")
    parser.add_argument("--variations", action="store_true", help="the pair with other data and captions too")
    parser.add_argument("--pictures", type=int, default=4096, help="pictures of the data set")
    parser.add_argument("--prompts", type=int, default=64, help="prompts of each set that every arm draws")
    parser.add_argument("--batch", type=int, default=32, help="pictures of an optimizer step")
    parser.add_argument("--draws", type=int, default=256, help="draws of the eval loss for each 100 timesteps")
    parser.add_argument("--handover", type=int, default=64, help="held-out pictures that hand-overs are judged by")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="trainers that share the cores")
    parser.add_argument("--threads", type=int, default=0, help="of each trainer; 0 is its share of the cores")
    parser.add_argument(
        "--rate", type=float, default=0.0, help="learning rate at first, falling as a cosine; 0: as kinds do"
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="what every arm begins with (default: %(default)s)")
    parser.add_argument("--prediction", choices=PREDICTIONS, default="v", help="what experts predict")
    parser.add_argument("--precision", default="fp32", help="of training: fp32 or bf16-mixed")
    return parser.parse_args(arguments)


def _asked(options: argparse.Namespace) -> Iterable[tuple[Arm, tuple[str, int]]]:
    for seed in range(options.seeds):
        for kind in options.kind:
            for arm in arms(options.steps, options.boundary, seed, kind):
                yield arm, (kind, seed)
        if options.variations:
            for arm in variations(options.steps, options.boundary[0], seed):
                yield arm, ("full", seed)


def _make_world(out: Path, pictures: int, prompts: int) -> None:
    if (out / "prompts.txt").exists():
        return
    sizes = [part for h, w in SIZES_HW for part in ("--size", f"{h}x{w}")]
    shapes = [sys.executable, "-m", "demo.shapes", str(out / "pictures"), "--count", str(pictures), "--seed", "21"]
    run([*shapes, "--metadata", *sizes])
    model = ["--model", str(MODEL), "--config", str(CONFIGS / "cache.toml"), "--set", "split.eval_fraction=0.06"]
    run(["cache-build", str(out / "pictures"), "--store", str(out / "store"), *model, "--device", "cpu"])
    run([sys.executable, "-m", "demo.prompts", str(out / "prompts.txt"), "--count", str(prompts)])


def _train(out: Path, runs: Sequence[Run], options: argparse.Namespace) -> None:
    """Train what is not done yet, as many at once as asked, each on its share of the cores; partners first."""
    share = {"OMP_NUM_THREADS": str(options.threads or max(1, (os.cpu_count() or 1) // options.at_once))}

    def train(one: Run) -> int:
        if steps_of(out / "runs" / one.name) >= one.steps:
            return 0
        sets = (
            f"name={one.name}",
            f"timesteps={{low={one.low}, high={one.high}}}",
            f"steps={one.steps}",
            f"seed={one.seed}",
            f"batch={options.batch}",
            f"precision={options.precision}",
            *QUIET,
            *KINDS[one.kind],
            f"optimizer.learning_rate={options.rate or RATES[one.kind]}",
            *PREDICTIONS[options.prediction],
            *one.sets,
        )
        places = [
            "--store",
            str(out / "store"),
            "--model",
            str(options.model),
            "--output",
            str(out / "runs" / one.name),
        ]
        if one.partner:
            places += ["--partner", str(out / "runs" / one.partner)]
        command = ["train-expert", "--config", str(CONFIGS / "expert.toml"), *places, "--device", "cpu"]
        return start([*command, *(part for one_set in sets for part in ("--set", one_set))], share).wait()

    for asks in (False, True):
        turn = [one for one in runs if bool(one.partner) == asks]
        with ThreadPoolExecutor(options.at_once) as pool:
            if failed := [one.name for one, code in zip(turn, pool.map(train, turn), strict=True) if code]:
                raise SystemExit(f"not trained: {', '.join(failed)}")


def _losses(out: Path, name: str, one: Run, options: argparse.Namespace, *, of_start: bool = False) -> Any:
    """Of a run, or of what it began with; measured where they are not there yet."""
    path = out / "losses" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        run_folder, store, cuts = out / "runs" / one.name, out / "store", stretches(CUTS)
        found = losses_of(run_folder, options.model, store, cuts, options.draws, of_start=of_start)
        write_atomically(path, json.dumps(found).encode())
    return _read(path)


def _cuts(arm: Arm, options: argparse.Namespace) -> Sequence[int]:
    """Where what an arm hands over is looked at: at its own boundary, or at all of them."""
    if not options.handover:
        return []
    return [arm.runs[-1].low] if len(arm.runs) > 1 else options.boundary


def _handed_over(out: Path, top: Run, boundary: int, options: argparse.Namespace) -> Any:
    """By the run that answers above the boundary."""
    path = out / "handovers" / f"{top.name}-at-{boundary}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        run_folder, store, count = out / "runs" / top.name, out / "store", options.handover
        drawing = {"steps": STEPS, "guidance": GUIDANCE}
        found = handover_of(run_folder, options.model, store, boundary, count, path.parent, **drawing)
        write_atomically(path, json.dumps(found).encode())
    return _read(path)


def _drawn(out: Path, arm: Arm, model: Path) -> list[dict[str, Any]]:
    """Verdicts on the arm's pictures; drawn where they are not there yet."""
    folder = out / "images" / "_".join(one.name for one in arm.runs)
    experts = [part for one in arm.runs for part in ("--expert", str(out / "runs" / one.name))]
    drawing = ["generate-images", *experts, "--model", str(model), "--batch", "12", "--device", "cpu"]
    return _judged(out, folder, drawing)


def _drawn_by_start(out: Path, model: Path) -> list[dict[str, Any]]:
    return _judged(out, out / "images" / "start", [sys.executable, "-m", "demo.pipeline", str(model)])


def _judged(out: Path, folder: Path, command: list[str]) -> list[dict[str, Any]]:
    path = folder.with_suffix(".json")
    if not path.exists():
        run([*command, "--prompts", str(out / "prompts.txt"), *DRAWING, "--out", str(folder)])
        write_atomically(path, json.dumps(verdicts_of(folder)).encode())
    found: list[dict[str, Any]] = _read(path)
    return found


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
