"""What trained experts are worth: loss on fixed draws stretch by stretch, and pictures read without a network.

    a run's newest checkpoint, store -> losses_of  -> {"0-200": {"loss", "bins"}, ...} of the stretches in its range
    an arm's pictures                -> verdicts_of -> for each prompt: does it follow, how sharp, how far off corners

All runs are measured over the same stretches, cut at every boundary that is compared, so the draws are the same whoever
answers for them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from demo.prompts import set_of
from demo.score import judge_folder
from shared.schedule import TimestepRange
from shared.store import StoreReader
from trainer.bench import open_bench
from trainer.checkpoint import Checkpoint, open_expert
from trainer.eval_axis import measure
from trainer.lineup import Candidate, LineUp, Part, line_up

BATCH = 32
Stretches = dict[str, dict[str, Any]]


def stretches(boundaries: Iterable[int], num_timesteps: int = 1000) -> list[TimestepRange]:
    """The schedule cut at every boundary, lowest timesteps first."""
    edges = sorted({0, num_timesteps, *boundaries})
    return [TimestepRange(low, high) for low, high in pairwise(edges)]


def losses_of(
    run: Path, model: Path, store: Path, cuts: Sequence[TimestepRange], draws: int, *, of_start: bool = False
) -> Stretches:
    """Of the expert, or of the model it began with, over the cuts in its range, `draws` for each 100 timesteps."""
    checkpoint = open_expert(run)
    with StoreReader(store) as reader:
        bench = open_bench(store, reader, None, [checkpoint])
        line = line_up([checkpoint], model, None, bench.manifest.settings, is_whole=False)
        start, expert = line.candidates
        inside = [cut for cut in cuts if cut.low in checkpoint.card.facts.timesteps]
        return _measured(line, start if of_start else expert, inside, bench, draws)


def verdicts_of(folder: Path) -> list[dict[str, Any]]:
    """One entry for each picture in `folder`, in the order of the prompts."""
    return [
        {
            "prompt": one.prompt,
            "set": set_of(one.prompt),
            "follows": one.verdict.follows,
            "sharpness": one.detail.sharpness if one.detail else None,
            "corner_error_px": one.detail.corner_error_px if one.detail else None,
        }
        for one in judge_folder(folder)
    ]


def steps_of(run: Path) -> int:
    """Optimizer steps that a run has done; 0 where there is none."""
    if not (run / "checkpoints").is_dir():
        return 0
    checkpoint: Checkpoint = open_expert(run)
    return checkpoint.state.step


def _measured(line: LineUp, who: Candidate, cuts: Sequence[TimestepRange], bench: Any, draws: int) -> Stretches:
    found: Stretches = {}
    for cut in cuts:
        alone = replace(line, parts=(Part(cut, who.within(cut), None),))
        count = round(draws * len(cut) / 100)
        losses = measure(
            alone,
            bench.samples,
            bench.read,
            draws=count,
            batch=BATCH,
            device=torch.device("cpu"),
            advance=lambda done: None,
        )
        one = losses[who.name][cut]
        found[f"{cut.low}-{cut.high}"] = {
            "loss": one.loss,
            "draws": one.draws,
            "bins": [[part.low, part.high, part.loss, part.samples] for part in one.bins],
        }
    return found
