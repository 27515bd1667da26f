"""Experts as they draw: a UNet each, or for adapters one UNet for all that stand on the same, and a switch.

checkpoints -> find_bases -> load_experts -> trainer/ensemble.py
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from shared.contract import StartFacts
from shared.errors import ConfigError, ContractError, DataError
from shared.model_folder import COMPONENTS, FILE_SUFFIXES, resolve_model
from trainer.adapter import adapter_weights, load_adapter
from trainer.checkpoint import Checkpoint, open_checkpoint, open_expert
from trainer.ensemble import Expert
from trainer.rotation import checkpoint_name
from trainer.unet import ConditionedUnet, load_unet, unet_digest

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def needed_components(experts: Sequence[Path]) -> tuple[str, ...]:
    """Folders of a model that drawing with these experts needs: its UNet where one of them is an adapter."""
    is_adapter = any(_says_adapter(path / "expert.json") for path in experts)
    unneeded = {"scheduler"} | (set() if is_adapter else {"unet"})
    return tuple(part for part in COMPONENTS if part not in unneeded)


def resolve_base(base: Path | None) -> Path | None:
    """What `--base` names; one .safetensors file is taken as `--model` takes it.

    Raises DataError where nothing is there, or a file that is no model.
    """
    if base is None or base.is_dir():
        return base
    if not base.exists():
        raise DataError(f"--base {base}: nothing is there")
    if base.suffix not in FILE_SUFFIXES:
        raise DataError(f"--base {base} is neither a folder nor a .safetensors file")
    return resolve_model(str(base), ("unet",))


def find_bases(checkpoints: Sequence[Checkpoint], model: Path, base: Path | None) -> list[Path]:
    """The UNet's folder of each expert: its own, or for an adapter the one that it was trained on, told by its digest.

    Raises ContractError where that is neither the model's nor `base`.
    """
    digests: dict[Path, str] = {}
    return [_base_of(checkpoint, model, base, digests) for checkpoint in checkpoints]


def check_base(checkpoints: Sequence[Checkpoint], base: Path | None) -> None:
    """Raise ConfigError where `base` is given and no expert is an adapter, which alone stands on one."""
    if base is not None and all(checkpoint.card.facts.adapter is None for checkpoint in checkpoints):
        raise ConfigError(f"--base {base} is what adapters stand on, and none of these experts is one: leave it out")


def load_experts(
    checkpoints: Sequence[Checkpoint],
    folders: Sequence[Path],
    refiner_width: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> list[Expert]:
    """Experts ready to draw, in `dtype` or else in bf16 on CUDA; adapters on the same folder share its UNet."""
    dtype = dtype or choose_dtype("auto", device)
    unets = {folder: load_unet(folder, device, dtype) for folder in dict.fromkeys(folders)}
    experts = []
    for index, (checkpoint, folder) in enumerate(zip(checkpoints, folders, strict=True)):
        facts, name = checkpoint.card.facts, None
        if facts.adapter is not None:
            name = f"expert-{index}"
            load_adapter(unets[folder], facts.adapter, name, checkpoint.weights(checkpoint.weights_folder().name))
            for weight in adapter_weights(unets[folder], name).values():
                weight.data = weight.data.to(dtype)
        experts.append(Expert(facts, ConditionedUnet(unets[folder], facts.layout, refiner_width, name), dtype))
    for unet in unets.values():
        unet.eval()
    return experts


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What UNets compute in: as named, or for "auto" bf16 on CUDA and else fp32; raises ConfigError for other names."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if precision not in PRECISIONS:
        raise ConfigError(f"--precision {precision}: known are auto, {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def precision_name(dtype: torch.dtype) -> str:
    """The name by which `choose_dtype` knows a dtype."""
    return next(name for name, known in PRECISIONS.items() if known == dtype)


def _base_of(checkpoint: Checkpoint, model: Path, base: Path | None, digests: dict[Path, str]) -> Path:
    facts = checkpoint.card.facts
    if facts.adapter is None:
        return checkpoint.weights_folder()
    folders = [model / "unet", *([] if base is None else [_started_from(base, facts.start)])]
    for folder in folders:
        digests[folder] = digests.get(folder) or unet_digest(folder)
        if digests[folder] == facts.start_model_digest:
            return folder
    other = f"step {facts.start.step} of {facts.start.name}" if facts.start else facts.base_model or "another model"
    way_out = "name it with --base" if base is None else f"neither is it {base}"
    raise ContractError(f"the adapter {facts.name!r} stands on the UNet of {other}, not of {model}: {way_out}")


def _started_from(base: Path, start: StartFacts | None) -> Path:
    """The folder of weights that an adapter was begun on: in a run folder, a checkpoint or another model's folder."""
    if (base / "model_index.json").exists():
        return base / "unet"
    own = base / "checkpoints" / checkpoint_name(start.step) if start else base
    checkpoint = open_checkpoint(own) if own.is_dir() and own != base else open_expert(base)
    return checkpoint.path / start.weights if start else checkpoint.weights_folder()


def _says_adapter(card: Path) -> bool:
    """Whether a card speaks of an adapter; what is wrong with it is said when it is opened."""
    try:
        return bool(json.loads(card.read_text(encoding="utf-8"))["facts"].get("adapter"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
