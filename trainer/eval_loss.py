"""The stable eval loss: the same held-out samples at the same timesteps with the same noise, every time it is asked.

    draw j of N     sample j mod M, its (j div M)-th repetition; t_j stratified over the expert's range, N in all
    eps, eps'       of the generator (0, "eval eps" | "eval posterior", sample id, repetition), drawn on the CPU
    loss            |prediction(x_t, t) - target|^2 by DenoisingLoss.at, whatever weights and noise training adds

So it depends on the weights, the samples and the range alone: not on the run's seed, its settings or the device. Runs
can be compared by it, and a start model with what became of it. Trainer and evaluator call the same function.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shared.schedule import TimestepRange, sample_timesteps
from shared.seeding import make_generator
from trainer.batch import Batch
from trainer.error_bars import Each
from trainer.eval_samples import PinnedSample
from trainer.loss import DenoisingLoss, Predict
from trainer.loss_bins import Bin, LossBins

# samples of one bucket -> a batch of those that can be read, and which these are
ReadSamples = Callable[[Sequence[PinnedSample]], tuple[Batch | None, list[int]]]


@dataclass(frozen=True)
class EvalDraw:
    """One held-out sample at one timestep; `repetition` tells its noise from that of its other draws."""

    sample: PinnedSample
    repetition: int
    t: int


@dataclass(frozen=True)
class EvalLoss:
    """Mean over all draws, and over those in each stretch of timesteps; `lost` draws could not be read."""

    loss: float
    bins: list[Bin]
    draws: int
    lost: int
    each: Each = field(default_factory=dict)  # of the draws that could be read


def plan_draws(samples: Sequence[PinnedSample], within: TimestepRange, count: int) -> list[EvalDraw]:
    """`count` draws of `samples` over the range: a function of its arguments alone."""
    t = sample_timesteps(within, count, make_generator(0, "eval t", count)).tolist()
    return [EvalDraw(samples[j % len(samples)], j // len(samples), t[j]) for j in range(count)]


@torch.no_grad()
def eval_loss(
    predict: Predict,
    loss: DenoisingLoss,
    samples: Sequence[PinnedSample],
    read: ReadSamples,
    *,
    count: int,
    batch: int,
    device: torch.device,
) -> EvalLoss:
    """The eval loss of what `predict` answers, over loss.within, of `count` draws in batches of at most `batch`.

    The squared error without weights, in units of what is predicted. A draw whose records are missing or damaged is
    left out and counted; NaN where none is left.
    """
    plain = loss.unweighted()
    bins, lost = LossBins(loss.within, torch.device("cpu"), torch.float64), 0
    each: dict[tuple[str, int], tuple[int, float]] = {}
    for chunk in _by_bucket(plan_draws(samples, loss.within, count), batch):
        found, kept = read([draw.sample for draw in chunk])
        lost += len(chunk) - len(kept)
        if found is None:
            continue
        draws = [chunk[i] for i in kept]
        t = torch.tensor([draw.t for draw in draws])
        eps, posterior = (_noise(what, draws, found.moments.mean).to(device) for what in ("eps", "posterior"))
        losses = plain.at(predict, found.to(device), t.to(device), eps, posterior)
        losses = losses.cpu()
        bins.add(t, losses)
        for draw, value in zip(draws, losses.tolist(), strict=True):
            each[draw.sample.sample_id, draw.repetition] = draw.t, value
    means = bins.read(bins.take())
    total = sum(part.loss * part.samples for part in means)
    return EvalLoss(total / (count - lost) if count > lost else float("nan"), means, count, lost, each)


@contextmanager
def holding(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let `model` compute with `weights` (by its names) for the length of the block; its own are put back untouched.

    Nothing is copied where they are of the model's device and dtype already; elsewhere they take room for once more.
    """
    own = {name: parameter.data for name, parameter in model.named_parameters() if name in weights}
    parameters = dict(model.named_parameters())
    try:
        for name, data in own.items():
            parameters[name].data = weights[name].to(data.device, data.dtype)
        yield
    finally:
        for name, data in own.items():
            parameters[name].data = data


def _by_bucket(draws: Sequence[EvalDraw], batch: int) -> Iterator[list[EvalDraw]]:
    """Draws of one bucket at a time, at most `batch` of them."""
    buckets: dict[tuple[int, int], list[EvalDraw]] = {}
    for draw in draws:
        buckets.setdefault(draw.sample.bucket_hw, []).append(draw)
    for _, own in sorted(buckets.items()):
        yield from (own[i : i + batch] for i in range(0, len(own), batch))


def _noise(what: str, draws: Sequence[EvalDraw], like: Tensor) -> Tensor:
    """fp32 noise [B, ...] in the shape of `like`, drawn on the CPU by the ids of samples."""
    rows = []
    for draw in draws:
        generator = make_generator(0, f"eval {what}", bytes.fromhex(draw.sample.sample_id), draw.repetition)
        rows.append(torch.randn(like.shape[1:], generator=generator))
    return torch.stack(rows)
