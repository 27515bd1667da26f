"""Which checkpoints stay: the newest, and besides them those of the lowest eval loss.

RUN/checkpoints/best.json    {"format": 1, "step", "path", "loss", "scores"}: the best, and each one's eval loss

The score of a checkpoint is written before it gets its name and belongs to it from then on, so a kill at any moment
leaves every checkpoint with its own score. One that was not evaluated at its own step has none and is never the best.
Where best.json is damaged, the scores are read from events.jsonl again.
"""

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from shared.atomic import write_atomically
from shared.runlog import read_events

OPTIMIZER_FILE = "optimizer.safetensors"
WITH_OPTIMIZER = 2  # newest checkpoints that keep the optimizer's state
BEST_FILE = "best.json"


def checkpoint_name(step: int) -> str:
    """Folder of the checkpoint of a step."""
    return f"step-{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run by name, newest first; not verified."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def best_checkpoints(run: Path) -> list[Path]:
    """Checkpoints that were evaluated, lowest eval loss first, of equal ones the newest; not verified."""
    scores = _read_scores(run)
    scored = [path for path in list_checkpoints(run) if path.name in scores]
    return sorted(scored, key=lambda path: scores[path.name])


def write_score(run: Path, step: int, score: float | None) -> None:
    """Set or take away the score of the checkpoint that is about to be saved at `step`."""
    name = checkpoint_name(step)
    others = {other: loss for other, loss in _read_scores(run).items() if other != name}
    own = {name: score} if score is not None and math.isfinite(score) else {}
    _write(run, list_checkpoints(run), others | own, also=name)


def rotate(run: Path, keep: int, keep_best: int) -> None:
    """Keep the `keep` newest checkpoints and `keep_best` of the lowest eval loss, optimizer state in the newest two."""
    parent, paths = run / "checkpoints", list_checkpoints(run)
    best = best_checkpoints(run)[:keep_best]
    staying = [path for i, path in enumerate(paths) if i < keep or path in best]
    _write(run, staying)  # before anything goes: it must not name what is no longer there
    for path in (*(path for path in paths if path not in staying), *parent.glob("damaged-*")):
        gone = parent / f".removing-{path.name}"
        os.rename(path, gone)  # so that nobody meets a half-removed checkpoint under its name
        shutil.rmtree(gone)
    for path in staying[WITH_OPTIMIZER:]:
        _drop_optimizer(path)


def point_to_best(run: Path) -> None:
    """Let best.json name the best of the checkpoints that are there, and their scores alone."""
    _write(run, list_checkpoints(run))


def _drop_optimizer(path: Path) -> None:
    """Take the optimizer's state out of a checkpoint and of its sums; a damaged one is left as it is."""
    try:
        sums = json.loads((path / "checksums.json").read_text())
        had = sums.pop(OPTIMIZER_FILE, None)
    except (OSError, ValueError, AttributeError, TypeError):
        return
    if had is not None:
        write_atomically(path / "checksums.json", json.dumps(sums, indent=1).encode())
    (path / OPTIMIZER_FILE).unlink(missing_ok=True)


def _read_scores(run: Path) -> dict[str, float]:
    path = run / "checkpoints" / BEST_FILE
    if not path.exists():
        return {}
    try:
        scores = json.loads(path.read_text())["scores"]
        return {str(name): float(score) for name, score in scores.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return _scores_of_events(run)


def _scores_of_events(run: Path) -> dict[str, float]:
    scores: dict[str, float] = {}
    for event in read_events(run / "events.jsonl"):
        if event.get("event") == "eval":
            score = event.get("loss_ema", event.get("loss"))
            if isinstance(score, float) and isinstance(event.get("step"), int):
                scores[checkpoint_name(event["step"])] = score
    return scores


def _write(run: Path, there: Sequence[Path], scores: dict[str, float] | None = None, also: str = "") -> None:
    """Write best.json for the checkpoints that are `there` and one `also` that will be; no file without any score."""
    path, known = run / "checkpoints" / BEST_FILE, _read_scores(run) if scores is None else scores
    names = [checkpoint.name for checkpoint in there if checkpoint.name in known]
    kept = {name: known[name] for name in sorted({*names, also} & known.keys())}
    if not kept:
        path.unlink(missing_ok=True)
        return
    best = min(names, key=lambda name: known[name], default=None)
    named = {"step": int(best.removeprefix("step-")), "path": best, "loss": known[best]} if best else {}
    content = json.dumps({"format": 1, **named, "scores": kept}, indent=1).encode() + b"\n"
    if not path.exists() or path.read_bytes() != content:
        write_atomically(path, content)
