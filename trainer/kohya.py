"""Adapters under kohya's names, which ComfyUI and its neighbours read: one file for each stage.

unet.down_blocks.1.attentions.0...to_q.lora_A.weight -> lora_unet_input_blocks_4_1_..._to_q.lora_down.weight
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from shared.errors import ConfigError
from shared.model_folder import model_name
from shared.original_layout import original_name, unet_modules
from shared.tensor_file import LazyTensor, file_bytes, from_tensor, write_lazily
from trainer.adapter import PREFIX
from trainer.bundle_folder import write_json, write_scheduler
from trainer.bundle_proof import load_with_adapter, prove
from trainer.bundle_stage import Stage
from trainer.comfy import WORKFLOW_FILE, lora_workflow
from trainer.original_file import require_sayable

KOHYA_PREFIX = "lora_unet_"
_ENDS = {
    ".lora_A.weight": ".lora_down.weight",
    ".lora_B.weight": ".lora_up.weight",
}


def kohya_bytes(stages: Sequence[Stage], model: Path) -> int:
    """What the files take on a disk."""
    return sum(file_bytes(stage.tensors()) for stage in stages)


def write_kohya(stages: Sequence[Stage], model: Path, out: Path) -> dict[str, str]:
    """Write each stage's file and a workflow into `out`; returns the files' sha256.

    Raises ConfigError where an expert is no LoRA, ContractError where its schedule is none that loaders know of.
    """
    _require_loras(stages)
    require_sayable(stages[0].card.contract)
    sums = {}
    for stage in stages:
        name = f"{stage.folder}.safetensors"
        sums[name] = write_lazily(out / name, kohya_tensors(stage), kohya_metadata(stage) | stage.tags())
        (out / stage.folder).mkdir()
        write_scheduler(stage.card.contract, out / stage.folder / "scheduler")
    write_json(out / WORKFLOW_FILE, lora_workflow(stages, [_checkpoint(stage, model_name(model)) for stage in stages]))
    return sums


def prove_kohya(folder: Path, stages: Sequence[Stage], model: Path, device: str) -> list[str]:
    """As prove_folders, with adapters that diffusers loads by kohya's names."""
    return prove(
        stages,
        device,
        lambda stage, dtype: load_with_adapter(
            stage, model, dtype, folder / stage.folder, folder / f"{stage.folder}.safetensors"
        ),
    )


def kohya_tensors(stage: Stage) -> dict[str, LazyTensor]:
    """An adapter's tensors by kohya's names, with the alpha that scales each layer."""
    assert stage.facts.adapter is not None
    modules = unet_modules(stage.config())
    alpha = from_tensor(torch.tensor(float(stage.facts.adapter.alpha)))
    named: dict[str, LazyTensor] = {}
    for name, tensor in stage.tensors().items():
        end = next(end for end in _ENDS if name.endswith(end))
        layer = name.removeprefix(PREFIX).removesuffix(end)
        place = kohya_place(layer, modules)
        named[place + _ENDS[end]] = tensor
        named[f"{place}.alpha"] = alpha
    return named


def kohya_place(layer: str, modules: Mapping[str, str]) -> str:
    """What a layer is called: its original name in underscores; `modules` are those of its UNet."""
    return KOHYA_PREFIX + original_name(layer, modules).replace(".", "_")


def kohya_metadata(stage: Stage) -> dict[str, Any]:
    """What kohya's programs look for in a file's header."""
    adapter = stage.facts.adapter
    assert adapter is not None
    is_v = stage.card.contract.prediction_type == "v_prediction"
    return {
        "ss_base_model_version": "sdxl_base_v1-0" if stage.facts.layout == "sdxl" else "sdxl_refiner_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(adapter.rank),
        "ss_network_alpha": f"{adapter.alpha:g}",
        "ss_v2": "False",
        "ss_v_parameterization": str(is_v),
        "ss_zero_terminal_snr": str(stage.card.contract.zero_terminal_snr),
        "ss_output_name": stage.facts.name,
    }


def _checkpoint(stage: Stage, model: str) -> str:
    """What the file may be called that holds the UNet which a stage's adapter stands on."""
    facts, name = stage.facts, model
    if not stage.is_on_model:
        name = facts.start.name if facts.start else facts.base_model or f"{stage.folder}_base"
    return f"{name.rpartition('/')[2]}.safetensors"


def _require_loras(stages: Sequence[Stage]) -> None:
    """Programs make different weights of a DoRA's `dora_scale`, diffusers none: what cannot be proved is not written.

    peft divides W + s B A by its own norm over each output's row, ComfyUI by that of W alone, others by columns.
    """
    for stage in stages:
        adapter, name = stage.facts.adapter, stage.facts.name
        if adapter is None:
            raise ConfigError(
                f"--format kohya-lora: {name!r} is a whole UNet, not an adapter; use --format single-file"
            )
        if adapter.kind != "lora":
            raise ConfigError(
                f"--format kohya-lora: {name!r} is a DoRA, which programs read differently there; use "
                "--format diffusers, or single-file, which merges it"
            )
