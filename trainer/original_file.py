"""Stages as single files in the original layout, which ComfyUI loads: UNet, VAE and text encoders in one each.

DIR/stage_1.safetensors    everything, adapters added to their UNets; `v_pred` and `ztsnr` where the pair needs them
DIR/stage_1/               settings and tokenizers, for `from_single_file(FILE, config=...)` without a network
DIR/workflow.json          ComfyUI, its form for programs: two samplers, split at the step of the boundary (comfy.py)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from shared.conditioning import Layout
from shared.contract import PairContract
from shared.errors import ContractError
from shared.original_layout import original_big_g, original_clip_l, original_unet, original_vae
from shared.original_settings import attention_counts
from shared.tensor_file import LazyTensor, cast_to, file_bytes, read_lazily, write_lazily
from shared.weights import find_weights, read_component_config
from trainer.bundle_folder import WHOLE, component_files, copy_files, index_of, write_json, write_scheduler
from trainer.bundle_proof import prove, quiet
from trainer.bundle_stage import Stage
from trainer.comfy import WORKFLOW_FILE, checkpoint_workflow

_MODELSPEC_PREDICTION = {"epsilon": "epsilon", "v_prediction": "v"}
# What every loader takes for granted of a file in this layout: betas (shape, first, last) and how many there are.
_SCHEDULE = ("scaled_linear", 0.00085, 0.012, 1000)
# Transformer layers of its blocks on the way down and up: SDXL's with fewer.
_SSD_1B = [[0, 0], [2, 2], [4, 4]], [[4, 4, 10], [2, 1, 1], [0, 0, 0]]


def files_bytes(stages: Sequence[Stage], model: Path) -> int:
    """What the files take on a disk."""
    return sum(file_bytes(original_tensors(stage, model)) for stage in stages)


def write_files(stages: Sequence[Stage], model: Path, out: Path) -> dict[str, str]:
    """Write each stage's file, and its settings, into `out`; returns the sha256 of each file."""
    sums = {}
    for stage in stages:
        folder = out / stage.folder
        folder.mkdir()
        for part in WHOLE[stage.facts.layout]:
            copy_files(
                [file for file in component_files(model / part) if "safetensors" not in file.name], folder / part
            )
        (folder / "unet").mkdir()
        write_json(folder / "unet" / "config.json", stage.config())
        write_json(folder / "model_index.json", index_of(stage))
        write_scheduler(stage.card.contract, folder / "scheduler")
        name = f"{stage.folder}.safetensors"
        sums[name] = write_lazily(out / name, original_tensors(stage, model), modelspec(stage) | stage.tags())
    write_json(out / WORKFLOW_FILE, checkpoint_workflow(stages))
    return sums


def prove_files(folder: Path, stages: Sequence[Stage], model: Path, device: str) -> list[str]:
    """As prove_folders, with pipelines that diffusers makes of the single files."""
    return prove(stages, device, lambda stage, dtype: load_file_pipeline(folder, stage, dtype))


def load_file_pipeline(folder: Path, stage: Stage, dtype: torch.dtype) -> Any:
    """A stage as `from_single_file` loads it, without a network."""
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

    kind = StableDiffusionXLPipeline if stage.number == 1 else StableDiffusionXLImg2ImgPipeline
    file, config = folder / f"{stage.folder}.safetensors", folder / stage.folder
    with quiet():
        return kind.from_single_file(str(file), config=str(config), local_files_only=True, torch_dtype=dtype)


def original_tensors(stage: Stage, model: Path) -> dict[str, LazyTensor]:
    """Everything of a stage by its original names; raises ContractError as `require_sayable` does."""
    contract = stage.card.contract
    require_sayable(contract)
    tensors = original_unet(stage.tensors(), stage.config())
    rest = original_vae(read_lazily(find_weights(model / "vae")), read_component_config(model / "vae"))
    is_base = stage.facts.layout == "sdxl"
    if is_base:
        rest |= original_clip_l(read_lazily(find_weights(model / "text_encoder")))
    rest |= original_big_g(read_lazily(find_weights(model / "text_encoder_2")), 1 if is_base else 0)
    tensors |= {name: cast_to(tensor, stage.dtype) for name, tensor in rest.items()}
    marks = {"v_pred": contract.prediction_type == "v_prediction", "ztsnr": contract.zero_terminal_snr}
    return tensors | {name: LazyTensor("F32", (0,), lambda: b"") for name, is_so in marks.items() if is_so}


def require_sayable(contract: PairContract) -> None:
    """Raise ContractError where a file of this layout cannot say what its UNet predicts, or on which schedule."""
    if contract.prediction_type not in _MODELSPEC_PREDICTION:
        raise ContractError(
            f"no program knows from a file that it predicts {contract.prediction_type!r}; use --format diffusers"
        )
    own = (contract.beta_schedule, contract.beta_start, contract.beta_end, contract.num_timesteps)
    if own != _SCHEDULE:
        raise ContractError(
            f"no program knows from a file of betas {' '.join(map(str, own))}, and all would "
            f"take {' '.join(map(str, _SCHEDULE))}; use --format diffusers"
        )


def architecture(config: Mapping[str, Any], layout: Layout) -> str:
    """The name by which programs know what a file's UNet is made of, by ModelSpec's list and SwarmUI's for SSD-1B."""
    if attention_counts(config) == _SSD_1B:
        return "segmind-stable-diffusion-1b"
    return f"stable-diffusion-xl-v1-{'base' if layout == 'sdxl' else 'refiner'}"


def modelspec(stage: Stage) -> dict[str, str]:
    """What the file says of itself, by https://github.com/Stability-AI/ModelSpec."""
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture(stage.config(), stage.facts.layout),
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": stage.facts.name,
        "modelspec.license": stage.facts.base_licence or "unknown",
        "modelspec.prediction_type": _MODELSPEC_PREDICTION[stage.card.contract.prediction_type],
        "modelspec.timestep_range": f"{stage.facts.low},{stage.facts.high - 1}",
    }
