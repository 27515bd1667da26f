"""What a pair of experts must agree on, and what each may have of its own; both stand in every checkpoint.

PairContract is compared field by field before two experts draw together. ExpertFacts is recorded, never compared: it
says how to build this expert's inputs.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, model_validator

from shared.conditioning import Layout
from shared.errors import ContractError
from shared.schedule import BETAS, NoiseSchedule, PredictionType, TimestepRange, check_partition

NullPrompt = Literal["zeros", "encoded"]
Spacing = Literal["leading", "trailing", "linspace"]


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class PairContract(_Facts):
    """Equal in a pair: the schedule, what is predicted, and the spaces that latents and text live in."""

    num_timesteps: int
    """T: timesteps of the schedule."""
    beta_schedule: Literal["scaled_linear", "linear"]
    """How the betas run from first to last."""
    beta_start: float
    """First beta."""
    beta_end: float
    """Last beta."""
    zero_terminal_snr: bool
    """Whether the betas are rescaled so that nothing of the picture is left at the last timestep."""
    prediction_type: PredictionType
    """What the UNet gives: eps, v or x_0."""
    timestep_spacing: Spacing
    """How a scheduler must place its steps at inference."""
    scaling_factor: float
    """x_0 = scaling_factor * z."""
    vae_digest: str
    """Digest of the VAE's weights, hex."""
    text_digests: dict[str, str]
    """Digest of each text encoder and tokenizer that the expert uses, by model folder, hex."""

    def schedule(self, device: torch.device | str = "cpu") -> NoiseSchedule:
        """The noise schedule that the contract names, its tables on `device`."""
        betas = BETAS[self.beta_schedule](self.num_timesteps, self.beta_start, self.beta_end)
        return NoiseSchedule(betas, zero_terminal_snr=self.zero_terminal_snr, device=device)


class ManifestUse(_Facts):
    """One stretch of training on one manifest."""

    name: str
    """Manifest name."""
    digest: str
    """Digest of the manifest, hex."""
    from_step: int
    """Optimizer step at which it began."""
    from_epoch: int
    """Epoch at which it began."""


class AdapterFacts(_Facts):
    """What an adapter is, beside its weights; DoRA (Liu et al. 2024) is LoRA with a magnitude for each output."""

    kind: Literal["lora", "dora"]
    """"lora": W + alpha / rank B A; "dora": that, normed by rows, times a magnitude that is learned."""
    rank: int
    """Inner width of the two matrices."""
    alpha: float
    """The update is scaled by alpha / rank."""
    targets: tuple[str, ...]
    """Presets and patterns of the layers that have one, as configured."""


class StartFacts(_Facts):
    """The expert whose weights another one began with."""

    name: str
    """What it was called."""
    low: int
    """First timestep of its range."""
    high: int
    """First timestep beyond its range."""
    step: int
    """Optimizer step of its checkpoint."""
    weights: Literal["unet", "ema"]
    """Folder of the checkpoint that was taken: raw or averaged."""
    sha256: str
    """sha256 of that folder's weights, hex."""
    adapter: AdapterFacts | None = None
    """The adapter that it is, if it is one."""


class ExposureFacts(_Facts):
    """What an expert was shown of its partner's predictions where the partner hands over to it."""

    share: float
    """Share of its samples that came from the partner."""
    reach: int
    """Timesteps on either side of the edge between which the partner took them."""
    partner: str
    """What the partner is called."""


class ExpertFacts(_Facts):
    """Recorded, may differ in a pair: who the expert is, and how its inputs are built."""

    name: str
    """What the expert is called; nothing is decided by it."""
    low: int
    """First timestep of its range."""
    high: int
    """First timestep beyond its range."""
    layout: Layout
    """Layout of the UNet's added conditioning."""
    null_prompt: NullPrompt
    """What stands for "no prompt": zeros, or the encoded empty prompt."""
    text_chunks: int
    """Stretches of 77 tokens that captions were encoded in."""
    aesthetic_score: float
    """Score given in training and to the prompt at inference (sdxl-refiner layout)."""
    negative_aesthetic_score: float
    """Score given to the null prompt at inference (sdxl-refiner layout)."""
    precision: str
    """Precision it was trained in."""
    start_model_digest: str
    """Digest of the UNet weights that training started from, hex; of those that an adapter stands on."""
    base_model: str = ""
    """Hub id or folder name of the model that --model named."""
    base_licence: str = ""
    """Its licence, as its own card says; empty where it does not."""
    trainable: tuple[str, ...] = ("full",)
    """Presets and patterns of the parameters that were trained, as configured; an adapter's are its own."""
    adapter: AdapterFacts | None = None
    """What unet/ and ema/ hold in place of a whole UNet, if the expert is an adapter."""
    start: StartFacts | None = None
    """The expert that training started from, if it was one."""
    exposure: ExposureFacts | None = None
    """What it met of a partner's predictions, if anything."""
    manifests: tuple[ManifestUse, ...]
    """Manifests it was trained on, in order."""

    @model_validator(mode="before")
    @classmethod
    def _without_overlap(cls, given: object) -> object:
        """Files of this format may tell of a band beyond the range, in which an expert was trained and never asked."""
        return {key: value for key, value in given.items() if key != "overlap"} if isinstance(given, dict) else given

    @property
    def timesteps(self) -> TimestepRange:
        """The range [low, high)."""
        return TimestepRange(self.low, self.high)


class ExpertCard(_Facts):
    """The content of expert.json."""

    format: Literal[1] = 1
    contract: PairContract
    facts: ExpertFacts


def check_pair(cards: Sequence[ExpertCard]) -> None:
    """Require that experts can draw together over all timesteps; raises ContractError naming the field or the gap."""
    for one, other in combinations(cards, 2):
        check_same(one, other)
    check_partition([card.facts.timesteps for card in cards], cards[0].contract.num_timesteps)


def check_same(one: ExpertCard, other: ExpertCard) -> None:
    """Require equal contracts, over the text towers that both use; raises ContractError naming the field."""
    a, b = one.contract, other.contract
    names = f"experts {one.facts.name!r} and {other.facts.name!r}"
    for field in PairContract.model_fields:
        if field != "text_digests" and getattr(a, field) != getattr(b, field):
            raise ContractError(f"{names} differ in {field}: {getattr(a, field)} against {getattr(b, field)}")
    for part in sorted(a.text_digests.keys() & b.text_digests.keys()):
        if a.text_digests[part] != b.text_digests[part]:
            raise ContractError(f"{names} differ in text_digests.{part}: they were trained on other text embeds")


def check_model(cards: Sequence[ExpertCard], model: str, vae_digest: str, text_digests: Mapping[str, str]) -> None:
    """Require that experts work with the VAE and the text towers of `model`; raises ContractError naming the part."""
    for card in cards:
        if card.contract.vae_digest != vae_digest:
            raise ContractError(f"the VAE of {model} is not the one that the latents of {card.facts.name!r} come from")
        for part, digest in card.contract.text_digests.items():
            if text_digests.get(part) != digest:
                raise ContractError(f"the {part} of {model} is not the one that {card.facts.name!r} was trained with")
