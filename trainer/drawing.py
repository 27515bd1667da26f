"""Which pictures a command asks for: prompts x seeds, or given pictures x seeds, and in which batches they are drawn.

cli.py -> GenerateRequest -> plan_drawings -> batches -> generate.py
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from shared.conditioning import MicroConditioning
from shared.contract import ExpertFacts, PairContract
from shared.errors import ConfigError
from trainer.ensemble import DrawSettings, expert_at
from trainer.sources import SizeRule, Source, find_sources


@dataclass(frozen=True)
class GenerateRequest:
    """What a `generate-images` command asks for; what may differ by expert stands in the experts' order."""

    experts: Sequence[Path]
    model: Path
    prompts: Sequence[str | tuple[str, ...]]  # one text for all experts, or one for each
    out: Path
    settings: DrawSettings = field(default_factory=DrawSettings)
    negative_prompt: str | tuple[str | None, ...] | None = None  # None: the null prompt
    seed: int = 0
    count: int = 1
    height: int | None = None
    width: int | None = None
    device: str = "auto"
    base: Path | None = None  # what adapters stand on, if it is not the model's UNet
    batch: int = 1
    precision: str = "auto"
    offload: bool = False  # one UNet on the device at a time
    sheet: Path | None = None
    from_images: Path | None = None  # a picture, a folder of them, or a store
    manifest: str = "main"
    start_timestep: int | None = None
    limit: int | None = None  # of pictures in from_images


@dataclass(frozen=True)
class Drawing:
    """One picture to be drawn."""

    name: str
    prompts: tuple[str, ...]  # one for each expert
    seed: int
    hw: tuple[int, int]  # px
    sizes: MicroConditioning
    source: Source | None = None

    def generator(self) -> torch.Generator:
        """Of its noise: by the seed alone, as everybody's scripts have it, or by seed and picture."""
        return torch.Generator().manual_seed(self.seed) if self.source is None else self.source.generator(self.seed)


def plan_drawings(
    request: GenerateRequest, contract: PairContract, experts: int, own_px: int, steps_px: tuple[int, int]
) -> tuple[list[Drawing], int]:
    """Every picture, in order, and how many have none to begin with that can be read.

    `steps_px` are what sizes must and what they should be multiples of.

    Raises ConfigError, or DataError for pictures that cannot be begun with, where something does not add up.
    """
    for name, value in (("--height", request.height), ("--width", request.width)):
        if value is not None and value % steps_px[0]:
            raise ConfigError(f"{name} {value}: sizes are multiples of {steps_px[0]} pixels")
    prompts = [(text,) * experts if isinstance(text, str) else text for text in request.prompts]
    seeds = range(request.seed, request.seed + request.count)
    if request.from_images is None:
        hw = (request.height or own_px, request.width or own_px)
        sizes = MicroConditioning(hw, (0, 0), hw)
        asked = [(index, texts, seed) for index, texts in enumerate(prompts) for seed in seeds]
        return [Drawing(_name(index, seed), texts, seed, hw, sizes) for index, texts, seed in asked], 0
    rule = SizeRule(request.height, request.width, own_px, steps_px[1])
    sources, unreadable = find_sources(request.from_images, request.manifest, rule, contract, request.limit)
    pairs = zip(sources, _one_for_each(prompts, sources, experts), strict=True)
    drawings = [
        Drawing(_name(index, seed), texts, seed, source.hw, source.sizes, source)
        for index, (source, texts) in enumerate(pairs)
        for seed in seeds
    ]
    return drawings, unreadable * request.count


def first_timestep(request: GenerateRequest, facts: Sequence[ExpertFacts], contract: PairContract) -> float | None:
    """Given pictures are drawn from the schedule's first timestep at or below this one on; None: from noise.

    By default just below B, the end of the range that begins at 0. Raises ConfigError where no expert answers for it.
    """
    if request.from_images is None:
        if request.start_timestep is not None:
            raise ConfigError("--start-timestep says from where on given pictures are drawn: give --from-images")
        return None
    ranges = ", ".join(f"{own.name} {own.timesteps}" for own in facts)
    asked = request.start_timestep
    if asked is not None:
        if expert_at(facts, asked) is None:
            raise ConfigError(f"--start-timestep {asked}: no expert answers for it ({ranges})")
        return float(asked)
    boundary = next((own.high for own in facts if own.low == 0), None)
    if boundary is None or boundary >= contract.num_timesteps:
        raise ConfigError(f"say from which timestep on pictures are drawn: --start-timestep ({ranges})")
    return boundary - 1e-3  # below B itself, above every step of a schedule that is


def batches(drawings: Sequence[Drawing], most: int) -> Iterator[list[Drawing]]:
    """Drawings of one size at a time, at most so many."""
    by_size: dict[tuple[int, int], list[Drawing]] = {}
    for drawing in drawings:
        by_size.setdefault(drawing.hw, []).append(drawing)
    for own in by_size.values():
        yield from (own[i : i + most] for i in range(0, len(own), most))


def _name(index: int, seed: int) -> str:
    return f"{index:03d}-seed-{seed}"


def _one_for_each(prompts: Sequence[tuple[str, ...]], sources: Sequence[Source], experts: int) -> list[tuple[str, ...]]:
    """The texts of each picture: one for all of them, one for each, or its own caption."""
    if not prompts:
        for source in sources:
            if source.caption is None:
                raise ConfigError(f"{source.name} has no caption beside it (.txt): give --prompt")
        return [(source.caption or "",) * experts for source in sources]
    if len(prompts) not in (1, len(sources)):
        raise ConfigError(f"{len(prompts)} prompts for {len(sources)} pictures: give one, or one for each")
    return list(prompts) if len(prompts) > 1 else [prompts[0]] * len(sources)
