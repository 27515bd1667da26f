"""Who is judged: the start model and the experts, and the stretch of timesteps that each of them answers for.

    experts on disk, --model -> line_up -> parts that tile [0, T), each with the start model and, where one is trained
                                           for it, an expert -> load, one UNet at a time -> losses, pictures

The start model predicts what its scheduler_config.json says; where experts were trained to predict something else, its
answers are converted, so that what is compared is what it knows and not what it was never asked.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch

from shared.contract import ExpertFacts, PairContract, check_pair, check_same
from shared.device import free_unused_memory
from shared.errors import ContractError
from shared.manifest_rows import ManifestSettings
from shared.schedule import PredictionType, TimestepRange
from trainer.adapter import load_adapter
from trainer.checkpoint import Checkpoint
from trainer.config import resolve_null_prompt
from trainer.drawn import find_bases
from trainer.ensemble import Expert
from trainer.reparameterise import Reparameterised
from trainer.start import told_prediction
from trainer.unet import ConditionedUnet, choose_layout, load_unet, read_unet_config, unet_digest

START = "start model"


@dataclass(frozen=True)
class Candidate:
    """Weights that may answer for a part of the schedule."""

    name: str
    facts: ExpertFacts  # how its inputs are built; its range is that of the part
    folder: Path  # of the UNet, or of what an adapter stands on
    checkpoint: Checkpoint | None  # None: the start model
    gives: PredictionType  # what the UNet answers with

    def within(self, part: TimestepRange) -> "Candidate":
        """The same weights, asked about another stretch of timesteps."""
        facts = self.facts.model_copy(update={"low": part.low, "high": part.high})
        return Candidate(self.name, facts, self.folder, self.checkpoint, self.gives)


@dataclass(frozen=True)
class Part:
    """A stretch of the schedule, the start model on it, and the expert that was trained for it, if there is one."""

    within: TimestepRange
    start: Candidate
    trained: Candidate | None

    @property
    def candidates(self) -> list[Candidate]:
        """Whoever may answer, the start model first."""
        return [self.start] if self.trained is None else [self.start, self.trained]


@dataclass(frozen=True)
class LineUp:
    """Parts that tile the schedule, lowest timesteps first."""

    contract: PairContract
    parts: tuple[Part, ...]
    refiner_width: int

    @property
    def candidates(self) -> list[Candidate]:
        """Everyone once: the start model, then the experts from high timesteps to low."""
        trained = [part.trained for part in reversed(self.parts) if part.trained]
        return [self.parts[-1].start, *trained]

    @property
    def boundaries(self) -> list[int]:
        """Timesteps at which one expert hands over to another; the upper one answers for the timestep itself."""
        return [upper.within.low for lower, upper in pairwise(self.parts) if lower.trained and upper.trained]

    def choices(self) -> list[tuple[Candidate, ...]]:
        """Every way to give each part somebody: in the parts' order, the start model alone first, all experts last."""
        return list(product(*(part.candidates for part in self.parts)))


def line_up(
    checkpoints: Sequence[Checkpoint], model: Path, base: Path | None, known: ManifestSettings, *, is_whole: bool
) -> LineUp:
    """The line-up of verified experts beside the start model; with `is_whole` they must tile the schedule.

    Raises ContractError where contracts differ, ranges overlap or (is_whole) leave a gap, where the store's records
    are not those that they were trained on, or where an adapter's UNet is not at hand.
    """
    cards = [checkpoint.card for checkpoint in checkpoints]
    contract = cards[0].contract
    if is_whole:
        check_pair(cards)
    for card in cards[1:]:
        check_same(cards[0], card)
    _check_store(contract, known)
    folders = find_bases(checkpoints, model, base)
    names = _names(checkpoints)
    trained = [
        Candidate(name, checkpoint.card.facts, folder, checkpoint, contract.prediction_type)
        for name, checkpoint, folder in zip(names, checkpoints, folders, strict=True)
    ]
    start = _start_model(model, cards[0].facts, contract, known)
    parts = _tile(trained, start, contract.num_timesteps)
    return LineUp(contract, tuple(parts), known.text_widths[1])


@contextmanager
def loaded(candidate: Candidate, line: LineUp, device: torch.device, dtype: torch.dtype) -> Iterator[Expert]:
    """The candidate, ready to answer, on the device for the length of the block."""
    unet = load_unet(candidate.folder, device, dtype)
    try:
        yield as_expert(candidate, unet, line, dtype)
    finally:
        del unet
        free_unused_memory()


def as_expert(candidate: Candidate, unet: Any, line: LineUp, dtype: torch.dtype) -> Expert:
    """The candidate on the UNet in its folder; an adapter is put on it beside those that are there."""
    adapter, checkpoint = None, candidate.checkpoint
    if checkpoint is not None and candidate.facts.adapter is not None:
        adapter = candidate.name.replace(".", "_")
        load_adapter(unet, candidate.facts.adapter, adapter, checkpoint.weights(checkpoint.weights_folder().name))
        unet.to(dtype)
    asked = unet
    if candidate.gives != line.contract.prediction_type:
        asked = Reparameterised(unet, line.contract, candidate.gives)
    return Expert(candidate.facts, ConditionedUnet(asked, candidate.facts.layout, line.refiner_width, adapter), dtype)


def notes_on(line: LineUp) -> list[str]:
    """What a reader of the comparison should know of the start model."""
    start, wants = line.parts[0].start, line.contract.prediction_type
    notes = []
    if start.gives != wants:
        notes.append(f"the start model predicts {start.gives}; its answers are converted to the experts' {wants}")
    digest = unet_digest(start.folder)
    for candidate in line.candidates[1:]:
        if candidate.facts.start_model_digest != digest:
            notes.append(f"{candidate.name} did not begin with this start model")
    return notes


def _names(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """What each is called: its name, with its range where two are called the same or like the start model."""
    facts = [checkpoint.card.facts for checkpoint in checkpoints]
    plain = [one.name for one in facts]
    return [
        f"{one.name} {one.timesteps}" if plain.count(one.name) > 1 or one.name == START else one.name for one in facts
    ]


def _tile(trained: Sequence[Candidate], start: Candidate, num_timesteps: int) -> Iterator[Part]:
    """Parts from 0 to T: where no expert is trained the start model stands alone."""
    reached = 0
    for expert in sorted(trained, key=lambda one: one.facts.timesteps):
        within = expert.facts.timesteps
        if within.low < reached:
            raise ContractError(f"two experts answer for timesteps [{within.low}, {min(reached, within.high)})")
        if within.low > reached:
            gap = TimestepRange(reached, within.low)
            yield Part(gap, start.within(gap), None)
        yield Part(within, start.within(within), expert)
        reached = within.high
    if reached < num_timesteps:
        rest = TimestepRange(reached, num_timesteps)
        yield Part(rest, start.within(rest), None)


def _start_model(model: Path, like: ExpertFacts, contract: PairContract, known: ManifestSettings) -> Candidate:
    layout = choose_layout(read_unet_config(model / "unet"), known.text_widths, known.pooled_width)
    null_prompt = resolve_null_prompt("auto", known.zeros_for_empty_prompt)
    plain = {"name": START, "layout": layout, "null_prompt": null_prompt, "adapter": None, "start": None}
    facts = like.model_copy(update=plain)
    return Candidate(START, facts, model / "unet", None, told_prediction(model) or contract.prediction_type)


def _check_store(contract: PairContract, known: ManifestSettings) -> None:
    if contract.vae_digest != known.vae_digest:
        raise ContractError("the store's latents come from another VAE than those that the experts were trained on")
    for part, digest in contract.text_digests.items():
        if known.text_digests.get(part) != digest:
            raise ContractError(f"the store's text embeds come from another {part} than the experts were trained on")
