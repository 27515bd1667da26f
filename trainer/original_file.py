"""Stages as single files in the original layout, which ComfyUI loads: UNet, VAE and text encoders in one each.

DIR/stage_1.safetensors    everything, adapters added to their UNets; `v_pred` and `ztsnr` where the pair needs them
DIR/stage_1/               settings and tokenizers, for `from_single_file(FILE, config=...)` without a network
DIR/workflow.json          ComfyUI, its form for programs: two samplers, split at the step of the boundary
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from shared.errors import ContractError
from shared.original_layout import original_big_g, original_clip_l, original_unet, original_vae
from shared.tensor_file import LazyTensor, cast_to, file_bytes, read_lazily, write_lazily
from shared.weights import find_weights, read_component_config
from trainer.bundle_folder import WHOLE, component_files, copy_files, pipeline_index, write_json, write_scheduler
from trainer.bundle_proof import prove, quiet
from trainer.bundle_stage import Stage

_MODELSPEC_PREDICTION = {"epsilon": "epsilon", "v_prediction": "v"}
STEPS, CFG = 40, 7.5  # of the workflow; to be changed there


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
        write_json(folder / "model_index.json", pipeline_index(stage))
        write_scheduler(stage.card.contract, folder / "scheduler")
        name = f"{stage.folder}.safetensors"
        sums[name] = write_lazily(out / name, original_tensors(stage, model), modelspec(stage) | stage.tags())
    write_json(out / "workflow.json", comfyui_workflow(stages))
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
    """Everything of a stage by its original names; raises ContractError where a file cannot say what it predicts."""
    contract = stage.card.contract
    if contract.prediction_type not in _MODELSPEC_PREDICTION:
        raise ContractError(
            f"--format single-file: no program knows from a file that it predicts {contract.prediction_type!r}"
        )
    tensors = original_unet(stage.tensors(), stage.config())
    rest = original_vae(read_lazily(find_weights(model / "vae")), read_component_config(model / "vae"))
    is_base = stage.facts.layout == "sdxl"
    if is_base:
        rest |= original_clip_l(read_lazily(find_weights(model / "text_encoder")))
    rest |= original_big_g(read_lazily(find_weights(model / "text_encoder_2")), 1 if is_base else 0)
    tensors |= {name: cast_to(tensor, stage.dtype) for name, tensor in rest.items()}
    marks = {"v_pred": contract.prediction_type == "v_prediction", "ztsnr": contract.zero_terminal_snr}
    return tensors | {name: LazyTensor("F32", (0,), lambda: b"") for name, is_so in marks.items() if is_so}


def modelspec(stage: Stage) -> dict[str, str]:
    """What the file says of itself, by https://github.com/Stability-AI/ModelSpec."""
    kind = "base" if stage.facts.layout == "sdxl" else "refiner"
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-xl-v1-{kind}",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": stage.facts.name,
        "modelspec.license": stage.facts.base_licence or "unknown",
        "modelspec.prediction_type": _MODELSPEC_PREDICTION[stage.card.contract.prediction_type],
        "modelspec.timestep_range": f"{stage.facts.low},{stage.facts.high - 1}",
    }


def comfyui_workflow(stages: Sequence[Stage], steps: int = STEPS) -> dict[str, Any]:
    """A workflow in ComfyUI's API form: a sampler for each stage, one noise, split at the steps of the boundaries."""
    contract = stages[0].card.contract
    pixels = 8 * int(stages[0].config()["sample_size"])
    nodes: dict[str, Any] = {"latent": _node("EmptyLatentImage", width=pixels, height=pixels, batch_size=1)}
    latent: list[Any] = ["latent", 0]
    for stage in stages:
        name = stage.folder
        nodes[name] = _node("CheckpointLoaderSimple", ckpt_name=f"{name}.safetensors")
        for sign, text in (("positive", "a cat on a wall"), ("negative", "")):
            nodes[f"{name}_{sign}"] = _node("CLIPTextEncode", clip=[name, 1], text=text)
        model = [name, 0]
        if contract.zero_terminal_snr:
            nodes[f"{name}_rescale"] = _node("RescaleCFG", model=model, multiplier=0.7)
            model = [f"{name}_rescale", 0]
        nodes[f"{name}_sampler"] = _node(
            "KSamplerAdvanced",
            model=model,
            positive=[f"{name}_positive", 0],
            negative=[f"{name}_negative", 0],
            latent_image=latent,
            add_noise="enable" if stage.number == 1 else "disable",
            noise_seed=0,
            steps=steps,
            cfg=CFG,
            sampler_name="euler",
            scheduler="sgm_uniform",
            start_at_step=step_of(stage.facts.high, contract.num_timesteps, steps),
            end_at_step=step_of(stage.facts.low, contract.num_timesteps, steps),
            return_with_leftover_noise="disable" if stage.number == stage.count else "enable",
        )
        latent = [f"{name}_sampler", 0]
    nodes["decoded"] = _node("VAEDecode", samples=latent, vae=["stage_1", 2])
    nodes["saved"] = _node("SaveImage", images=["decoded", 0], filename_prefix="pair")
    return nodes


def step_of(boundary: int, num_timesteps: int, steps: int) -> int:
    """How many of `steps`, evenly down from the last timestep (ComfyUI's sgm_uniform), are at `boundary` or above."""
    return sum((num_timesteps - 1) * (1 - index / steps) >= boundary for index in range(steps)) if boundary else steps


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}
