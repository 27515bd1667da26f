"""One stage of a bundle: an expert, which of its weights are handed over, and in what form.

checkpoints, model -> read_stages -> Stage, in the order in which they draw: high noise first
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from shared.contract import ExpertCard, ExpertFacts, check_model, check_pair
from shared.errors import CheckpointError, ContractError
from shared.tensor_file import FloatDtype, LazyTensor, cast_to, from_tensor, mixed, read_lazily
from shared.text_encoders import read_text_facts
from shared.vae import read_vae_facts
from trainer.adapter import ADAPTER_FILE, load_adapter, merge_adapter
from trainer.checkpoint import UNET_FILE, Checkpoint, open_expert
from trainer.drawn import check_base, find_bases
from trainer.unet import load_unet, read_unet_config


@dataclass(frozen=True)
class Stage:
    """An expert as a bundle holds it."""

    number: int  # from 1, in the order of drawing
    count: int
    checkpoint: Checkpoint
    weights: str  # folder of the checkpoint: "ema" or "unet"
    unet: Path  # folder of the whole UNet: the expert's own, or the one that an adapter stands on
    is_merged: bool  # an adapter is added to its UNet
    dtype: FloatDtype | None  # None: as it was saved
    is_on_model: bool = True  # it is no adapter, or stands on the UNet of the bundle's model
    blend: "Blend | None" = None  # it is one model with another

    @property
    def folder(self) -> str:
        """Name of its folder or file in the bundle."""
        return f"stage_{self.number}"

    @property
    def card(self) -> ExpertCard:
        """The expert's card."""
        return self.checkpoint.card.model_copy(update={"facts": self.facts})

    @property
    def facts(self) -> ExpertFacts:
        """The expert's facts; of one model made of two, those of the first, for the timesteps of both."""
        own = self.checkpoint.card.facts
        if self.blend is None:
            return own
        other = self.blend.other.facts
        both = {"name": f"{own.name} + {other.name}", "low": min(own.low, other.low), "high": max(own.high, other.high)}
        return own.model_copy(update=both | {"adapter": None})

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """What it is made of."""
        return [self.checkpoint] if self.blend is None else [self.checkpoint, self.blend.other.checkpoint]

    @property
    def is_adapter(self) -> bool:
        """Whether it is handed over as an adapter: its UNet is somebody else's."""
        return self.facts.adapter is not None and not self.is_merged

    @property
    def starts(self) -> float | None:
        """`denoising_start` of its pipeline; None for the first stage."""
        return None if self.number == 1 else 1 - self.facts.high / self.card.contract.num_timesteps

    @property
    def ends(self) -> float | None:
        """`denoising_end` of its pipeline; None for the last stage."""
        return None if self.number == self.count else 1 - self.facts.low / self.card.contract.num_timesteps

    def config(self) -> dict[str, Any]:
        """Settings of its UNet."""
        return read_unet_config(self.unet)

    def tensors(self) -> dict[str, LazyTensor]:
        """What is handed over, by the names that it has in the checkpoint: a whole UNet, or an adapter."""
        own = self.checkpoint.path / self.weights
        if self.checkpoint.card.facts.adapter is None:
            stored = read_lazily([own / UNET_FILE])
        elif self.is_merged:
            stored = self._merged()
        else:
            stored = read_lazily([own / ADAPTER_FILE])
        if self.blend is not None:
            stored = self.blend.of(stored)
        return {name: cast_to(tensor, self.dtype) for name, tensor in stored.items()}

    def tags(self) -> dict[str, str]:
        """What a file of its weights says of itself."""
        facts, contract = self.facts, self.card.contract
        kind = "averaged" if self.weights == "ema" else "raw"
        return {
            "sdxl_experts.name": facts.name,
            "sdxl_experts.timesteps": f"{facts.low} {facts.high}",
            "sdxl_experts.num_timesteps": str(contract.num_timesteps),
            "sdxl_experts.prediction_type": contract.prediction_type,
            "sdxl_experts.zero_terminal_snr": str(contract.zero_terminal_snr).lower(),
            "sdxl_experts.weights": f"{kind}, step {self.checkpoint.state.step}",
        }

    def _merged(self) -> dict[str, LazyTensor]:
        adapter = self.checkpoint.card.facts.adapter
        assert adapter is not None
        unet = load_unet(self.unet, torch.device("cpu"))
        load_adapter(unet, adapter, self.folder, self.checkpoint.weights(self.weights))
        merge_adapter(unet)
        return {name: from_tensor(tensor) for name, tensor in unet.state_dict().items()}


@dataclass(frozen=True)
class Blend:
    """Another expert in the same weights: (1 - share) of the first and share of the other (arXiv:2109.01903, eq. 1)."""

    other: Stage
    share: float

    def of(self, first: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """`first` and the other's tensors, name by name; raises ContractError where they are not the same UNet."""
        other = self.other.tensors()
        if other.keys() != first.keys() or any(other[name].shape != first[name].shape for name in first):
            raise ContractError(f"the UNet of {self.other.facts.name!r} has other layers: nothing can be merged")
        return {name: mixed(tensor, other[name], self.share) for name, tensor in first.items()}


def one_model(stages: Sequence[Stage], share: float) -> Stage:
    """Both stages of a pair as one, for all of their timesteps; `share` is how much of it is the later, low-noise one.

    Raises ContractError where they are not two, or where one has the stock refiner's layout.
    """
    if len(stages) != 2:
        raise ContractError(f"two experts make one model, not {len(stages)}")
    upper, lower = (replace(stage, number=1, count=1, is_merged=True, dtype=None) for stage in stages)
    if lower.facts.layout != upper.facts.layout:
        raise ContractError(f"{lower.facts.name!r} has the stock refiner's layout: it cannot be one with another")
    return replace(upper, dtype=stages[0].dtype, blend=Blend(lower, share))


def read_stages(
    experts: Sequence[Path],
    model: Path,
    base: Path | None,
    is_merged: Callable[[ExpertFacts], bool],
    *,
    raw: bool,
    dtype: FloatDtype | None,
) -> list[Stage]:
    """The stages of experts that belong together and to `model`, verified.

    Raises CheckpointError where one is damaged, ContractError where they cannot draw together, or not in stages.
    """
    checkpoints = sorted((open_expert(path) for path in experts), key=lambda own: -own.card.facts.low)
    cards = [checkpoint.card for checkpoint in checkpoints]
    check_pair(cards)
    check_model(cards, str(model), read_vae_facts(model).digest, read_text_facts(model).digests)
    if cards[0].facts.layout != "sdxl":
        raise ContractError(
            f"{cards[0].facts.name!r} begins the picture and has the stock refiner's layout, which no pipeline of "
            "diffusers and no checkpoint loader begins with: draw with generate-images"
        )
    check_base(checkpoints, base)
    folders = find_bases(checkpoints, model, base)
    return [
        Stage(
            number=number,
            count=len(cards),
            checkpoint=checkpoint,
            weights=_chosen(checkpoint, raw),
            unet=folder,
            is_merged=checkpoint.card.facts.adapter is not None and is_merged(checkpoint.card.facts),
            dtype=dtype,
            is_on_model=checkpoint.card.facts.adapter is None or folder == model / "unet",
        )
        for number, (checkpoint, folder) in enumerate(zip(checkpoints, folders, strict=True), 1)
    ]


def _chosen(checkpoint: Checkpoint, raw: bool) -> str:
    name = "unet" if raw else checkpoint.weights_folder().name
    if not (checkpoint.path / name).is_dir():
        raise CheckpointError(f"{checkpoint.path} has no {name}/")
    return name
