"""What an evaluation draws, chosen and encoded once for all rounds: prompts, and held-out pictures of each data set.

prompts, captions -> embeds; the text encoders go     \\
held-out samples of each data set, their latents      -> Gallery -> easel.py
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from shared.conditioning import PromptEmbeds
from shared.errors import ContractError
from shared.store import StoreReader
from shared.vae import VaeFacts, read_vae_facts
from trainer.bench import Bench
from trainer.clip_score import ClipScorer
from trainer.drawn import choose_dtype
from trainer.ensemble import DrawSettings, plan_steps
from trainer.lineup import LineUp
from trainer.prompt_embeds import encode_prompts
from trainer.sources import Source, source_of_sample
from trainer.unet import read_unet_config


@dataclass(frozen=True)
class PictureWish:
    """What is to be drawn in each round."""

    prompts: Sequence[str] = ()
    settings: DrawSettings = field(default_factory=DrawSettings)
    seed: int = 0
    held_out: int = 4  # pictures of each data set that are finished
    precision: str = "auto"
    batch: int = 4
    clip: Path | None = None


@dataclass(frozen=True)
class Pictures:
    """What was drawn of one choice, as paths below the report's folder, and how it scores."""

    paths: list[str]
    scores: list[float]


@dataclass(frozen=True)
class Gallery:
    """Everything that is the same in all rounds: embeds of all texts, the held-out pictures, the CLIP."""

    wish: PictureWish
    model: Path
    out: Path
    vae: VaeFacts
    device: torch.device
    dtype: torch.dtype
    sources: Sequence[tuple[str, Source]]  # with the name of their data set
    embeds: Mapping[tuple[str, int], PromptEmbeds]
    clip: ClipScorer | None
    own_px: int

    def count(self, line: LineUp) -> int:
        """Pictures of one round."""
        finishing = len(line.parts[0].candidates) if finishes_from(line) is not None else 0
        return len(self.wish.prompts) * len(line.choices()) + len(self.sources) * finishing


def open_gallery(
    wish: PictureWish, model: Path, store: StoreReader, out: Path, bench: Bench, line: LineUp, device: torch.device
) -> Gallery | None:
    """Choose and encode what is drawn; None where there is nothing to draw.

    Raises DataError where the VAE, the text encoders or the CLIP cannot be used, ContractError where the steps never
    come to one of the parts.
    """
    pinned = bench.of_each_data_set(wish.held_out) if finishes_from(line) is not None else []
    if not (wish.prompts or pinned):
        return None
    facts = [one.facts for one in line.choices()[-1]]
    for own in facts if wish.prompts else facts[:1]:
        plan_steps([own], line.contract, wish.settings)
    vae = read_vae_facts(model)
    if vae.digest != line.contract.vae_digest:
        raise ContractError(f"the VAE of {model} is not the one that the experts' latents come from")
    dtype, clip = choose_dtype(wish.precision, device), ClipScorer(wish.clip) if wish.clip and wish.prompts else None
    sources = [(name, source_of_sample(lambda: nullcontext(store), sample)) for name, sample in pinned]
    texts = [*wish.prompts, *(source.caption or "" for _, source in sources)]
    chunks = list({own.text_chunks: own for own in facts}.values())
    encoded = encode_prompts(model, [(text,) * len(chunks) for text in texts], [None] * len(chunks), chunks, device)
    own_px = int(read_unet_config(line.parts[0].start.folder)["sample_size"]) * vae.downscale
    return Gallery(wish, model, out, vae, device, dtype, sources, encoded.kept, clip, own_px)


def finishes_from(line: LineUp) -> float | None:
    """Held-out pictures are drawn from the schedule's first timestep below this on: B; None where nothing is below."""
    return line.parts[0].within.high - 1e-3 if len(line.parts) > 1 else None
