"""Everybody's eval loss on one axis of timesteps: the same held-out samples, timesteps and noise for each candidate.

    stretches    each part of the schedule, and 50 timesteps on either side of each boundary between experts
    measure      candidate x stretch -> eval_loss, one UNet on the device at a time
    pair_loss    of whoever answers for which part: sum of loss * length / T
    sweep        the same for two experts that hand over at other timesteps than they were trained to

On its own part an expert's draws are those of its trainer's eval loss, so for an equal number of draws the number is
the one in its log.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shared.conditioning import PromptEmbeds
from shared.schedule import TimestepRange
from trainer.config import LossConfig
from trainer.ensemble import Expert
from trainer.error_bars import Each, between, difference, mean, standard_error
from trainer.eval_loss import EvalLoss, ReadSamples, eval_loss
from trainer.eval_samples import PinnedSample
from trainer.lineup import Candidate, LineUp, loaded
from trainer.loss import DenoisingLoss
from trainer.loss_bins import Bin

BESIDE = 50  # timesteps on either side of a boundary that are looked at more closely
SIDE_DRAWS = 1 / 4  # of the draws of a part

# eval loss of each candidate (by name) over each stretch
Losses = Mapping[str, Mapping[TimestepRange, EvalLoss]]


def stretches(line: LineUp, draws: int) -> dict[TimestepRange, int]:
    """Stretches of timesteps to measure, and how many draws each gets."""
    found = {part.within: draws for part in line.parts}
    for boundary in line.boundaries:
        for side in sides(boundary, line.contract.num_timesteps):
            found.setdefault(side, max(1, round(draws * SIDE_DRAWS)))
    return found


def sides(boundary: int, num_timesteps: int) -> tuple[TimestepRange, TimestepRange]:
    """The last timesteps below a boundary and the first from it on."""
    return (
        TimestepRange(max(0, boundary - BESIDE), boundary),
        TimestepRange(boundary, min(boundary + BESIDE, num_timesteps)),
    )


def measure(
    line: LineUp,
    samples: Sequence[PinnedSample],
    read: ReadSamples,
    *,
    draws: int,
    batch: int,
    device: torch.device,
    advance: Callable[[int], None],
) -> dict[str, dict[TimestepRange, EvalLoss]]:
    """The eval loss of every candidate over every stretch; weights in fp32, on CUDA under autocast as in training."""
    losses: dict[str, dict[TimestepRange, EvalLoss]] = {}
    counts = stretches(line, draws)
    for candidate in line.candidates:
        with loaded(candidate, line, device, torch.float32) as expert:
            for within, count in counts.items():
                loss = _objective(line, within, device)
                one = eval_loss(
                    partial(_predict, expert, device), loss, samples, read, count=count, batch=batch, device=device
                )
                losses.setdefault(candidate.name, {})[within] = one
                advance(count)
    return losses


def pair_loss(choice: Sequence[Candidate], line: LineUp, losses: Losses) -> float:
    """The eval loss over the whole schedule where each part is answered for by the candidate in its place."""
    total = sum(
        losses[one.name][part.within].loss * len(part.within) for one, part in zip(choice, line.parts, strict=True)
    )
    return total / line.contract.num_timesteps


def choice_change(choice: Sequence[Candidate], line: LineUp, losses: Losses) -> tuple[float | None, ...]:
    """Of the loss over the whole schedule: its standard error, what it is above the start model's, that one's error."""
    shares = [len(part.within) / line.contract.num_timesteps for part in line.parts]
    own = [losses[one.name][part.within].each for one, part in zip(choice, line.parts, strict=True)]
    starts = [losses[part.start.name][part.within].each for part in line.parts]
    changes = [difference(one, start) for one, start in zip(own, starts, strict=True)]
    means = [mean(change) for change in changes]
    above = None if None in means else sum(share * (one or 0.0) for share, one in zip(shares, means, strict=True))
    error, change_error = (standard_error(list(zip(shares, each, strict=True))) for each in (own, changes))
    return error, above, change_error


@dataclass(frozen=True)
class HandedOver:
    """Two experts that hand over at `boundary`, wherever they were trained to."""

    boundary: int
    loss: float
    """Over the whole schedule."""
    error: float | None
    """Standard error of that."""
    change: float | None
    """What it is above the loss at the boundary that they were trained for, over the draws that both have."""
    change_error: float | None
    """Standard error of that."""


def sweep(line: LineUp, losses: Losses) -> list[HandedOver]:
    """For two experts: the upper one answers from another timestep on; at the edges of stretches."""
    if len(line.boundaries) != 1 or len(line.parts) != 2:
        return []
    lower, upper = (part.trained for part in line.parts)
    assert lower is not None
    assert upper is not None
    below, above = (bins_on_axis(losses[one.name], line) for one in (lower, upper))
    drawn = [(_each_of(losses[lower.name], line, one), _each_of(losses[upper.name], line, one)) for one in below]
    shares = [(one.high - one.low) / sum(each.high - each.low for each in below) for one in below]
    edges = sorted({edge for one in below for edge in (one.low, one.high)})
    found = []
    for edge in edges:
        takes, trained = ([int(one.high > at) for one in below] for at in (edge, line.boundaries[0]))
        own = [(share, each[take]) for share, each, take in zip(shares, drawn, takes, strict=True)]
        moved = [
            (share, difference(each[take], each[before]))
            for share, each, take, before in zip(shares, drawn, takes, trained, strict=True)
            if take != before
        ]
        loss = _mean([pair[take] for pair, take in zip(zip(below, above, strict=True), takes, strict=True)])
        change = sum(share * (mean(each) or 0.0) for share, each in moved)
        found.append(HandedOver(edge, loss, standard_error(own), change, standard_error(moved) if moved else 0.0))
    return found


def _each_of(of: Mapping[TimestepRange, EvalLoss], line: LineUp, one: Bin) -> Each:
    """The draws of a stretch that lies in one of the parts."""
    within = next(part.within for part in line.parts if part.within.low <= one.low < part.within.high)
    return between(of[within].each, one.low, one.high)


def bins_on_axis(of: Mapping[TimestepRange, EvalLoss], line: LineUp) -> list[Bin]:
    """The stretches of 50 timesteps of every part, from 0 to T."""
    return [one for part in line.parts for one in of[part.within].bins]


def _mean(bins: Sequence[Bin]) -> float:
    """Mean over timesteps; a stretch that no draw fell into says nothing."""
    return sum(one.loss * (one.high - one.low) for one in bins) / sum(one.high - one.low for one in bins)


def _objective(line: LineUp, within: TimestepRange, device: torch.device) -> DenoisingLoss:
    contract = line.contract
    schedule = contract.schedule(device)
    return DenoisingLoss(schedule, within, contract.prediction_type, contract.scaling_factor, LossConfig(), 0)


def _predict(
    expert: Expert, device: torch.device, x_t: Tensor, t: Tensor, text: PromptEmbeds, time_ids: Tensor
) -> Tensor:
    autocast: AbstractContextManager[Any] = nullcontext()
    if device.type == "cuda":
        autocast = torch.autocast(device.type, torch.bfloat16)
    with autocast:
        return expert.model(x_t.to(expert.dtype), t, text, time_ids, expert.facts.aesthetic_score)
