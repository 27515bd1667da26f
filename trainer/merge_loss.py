"""What it costs to make one model of two experts: its eval loss beside the pair's and the start model's.

    experts, their one model's UNet, store -> merge_losses -> a loss over the whole schedule for each

Everybody is measured on the same held-out samples, timesteps and noise, part by part as evaluate-experts does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shared.contract import ExpertFacts
from shared.device import choose_device
from shared.progress import progress
from shared.store import StoreReader
from trainer.bench import open_bench
from trainer.checkpoint import open_expert
from trainer.eval_axis import Losses, measure, pair_loss, stretches
from trainer.lineup import START, Candidate, LineUp, Part, line_up

BATCH = 4


@dataclass(frozen=True)
class WholeLoss:
    """An eval loss over all timesteps, and how much it differs from the start model's, as a share of that."""

    name: str
    loss: float
    change: float


def merge_losses(
    experts: Sequence[Path],
    model: Path,
    base: Path | None,
    unet: Path,
    facts: ExpertFacts,
    store: Path,
    manifest: str | None,
    device_name: str,
    draws: int,
) -> list[WholeLoss]:
    """Losses of the start model, of the experts together and of the one model whose UNet is the folder `unet`.

    `draws` over each part of the schedule.
    Raises ContractError where the store's records are not those that the experts were trained on, DataError where
    nothing is held out.
    """
    checkpoints = [open_expert(path) for path in experts]
    device = choose_device(device_name)
    with StoreReader(store) as reader:
        bench = open_bench(store, reader, manifest, checkpoints)
        pair = line_up(checkpoints, model, base, bench.manifest.settings, is_whole=True)
        one = _alone(pair, Candidate(facts.name, facts, unet, None, pair.contract.prediction_type))

        def measured(line: LineUp) -> Losses:
            total = sum(stretches(line, draws).values()) * len(line.candidates)
            with progress("eval loss", total, "draws") as advance:
                return measure(
                    line, bench.samples, bench.read, draws=draws, batch=BATCH, device=device, advance=advance
                )

        of_pair, of_one = measured(pair), measured(one)
    start = pair_loss(pair.choices()[0], pair, of_pair)
    found = {
        START: start,
        "both experts": pair_loss(pair.choices()[-1], pair, of_pair),
        facts.name: pair_loss(one.choices()[0], one, of_one),
    }
    return [WholeLoss(name, loss, loss / start - 1) for name, loss in found.items()]


def _alone(pair: LineUp, one: Candidate) -> LineUp:
    """The line-up of one model in the start model's place: it answers for every part, on the pair's own draws."""
    parts = tuple(Part(part.within, one.within(part.within), None) for part in pair.parts)
    return replace(pair, parts=parts)
