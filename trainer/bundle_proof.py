"""The proof of a bundle: diffusers' own pipelines load each stage back and draw, and every step is made exactly once.

Stages are loaded one after the other, so it takes the memory of one; latents of a stage are handed to the next.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.command import one_line
from shared.device import choose_device
from shared.errors import ContractError
from trainer.adapter import ADAPTER_FILE, adapter_scales, adapter_weights
from trainer.bundle_stage import Stage
from trainer.schedulers import SCHEDULERS, make_scheduler
from trainer.unet import load_unet

# Schedulers that keep no history, so that stages with a scheduler each are one loop: what is proved with them is exact.
FIRST_ORDER = ("ddim", "euler", "euler-a")
LATENT_SIZE = 16  # small, but whole for four levels
MOST_STEPS = 1000


@dataclass
class _Drawn:
    """What has become of a picture so far."""

    generator: torch.Generator
    latents: Tensor | None = None
    timesteps: list[float] = field(default_factory=list)  # at which any stage's UNet was asked


def prove_folders(folder: Path, stages: Sequence[Stage], model: Path, device: str) -> list[str]:
    """What was proved, a line for each scheduler; raises ContractError where a stage does not do its part."""
    return prove(stages, device, lambda stage, dtype: load_pipeline(folder, stage, model, dtype))


def prove(stages: Sequence[Stage], device_name: str, load: Any) -> list[str]:
    """Draw with each supported first-order scheduler, stage by stage, and compare each stage's steps with its range.

    `load` gives the pipeline of a stage. Raises ContractError where a step is made twice, not at all, or elsewhere.
    """
    device = choose_device(device_name)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    contract = stages[0].card.contract
    names = [name for name in FIRST_ORDER if name in SCHEDULERS and _serves(name, contract)]
    steps = {name: _few_steps(name, stages) for name in names}
    drawn = {name: _Drawn(torch.Generator().manual_seed(0)) for name in names}
    for stage in stages:
        pipeline = load(stage, dtype).to(device)
        for name in names:
            pipeline.scheduler = type(make_scheduler(name, contract)).from_config(pipeline.scheduler.config)
            _draw_part(pipeline, stage, steps[name], drawn[name])
        del pipeline
    for name in names:
        _check(name, contract, steps[name], drawn[name])
    return [f"proved: {name}, {steps[name]} steps, each made once by its own stage" for name in names]


def load_pipeline(folder: Path, stage: Stage, model: Path, dtype: torch.dtype) -> Any:
    """A stage of a bundle in diffusers' form, as its card says to load it."""
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

    kind = StableDiffusionXLPipeline if stage.number == 1 else StableDiffusionXLImg2ImgPipeline
    with quiet():
        if not stage.is_adapter:
            return kind.from_pretrained(folder / stage.folder, use_safetensors=True, dtype=dtype)
    return load_with_adapter(stage, model, dtype, folder / stage.folder, folder / stage.folder / ADAPTER_FILE)


def load_with_adapter(stage: Stage, model: Path, dtype: torch.dtype, folder: Path, file: Path) -> Any:
    """A stage's pipeline on the UNet that its adapter stands on: its scheduler of `folder`, itself of `file`.

    Raises ContractError where diffusers does not read the whole adapter back.
    """
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UniPCMultistepScheduler

    kind = StableDiffusionXLPipeline if stage.number == 1 else StableDiffusionXLImg2ImgPipeline
    with quiet():
        parts: dict[str, Any] = {
            "scheduler": UniPCMultistepScheduler.from_pretrained(folder, subfolder="scheduler"),
            "unet": load_unet(stage.unet, torch.device("cpu"), dtype),
        }
        if stage.facts.layout == "sdxl-refiner":  # the model is a base: the refiner's pipeline is made of its parts
            is_zeros = stage.facts.null_prompt == "zeros"
            parts |= {"text_encoder": None, "tokenizer": None}
            parts |= {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": is_zeros}
        pipeline = kind.from_pretrained(model, **parts, use_safetensors=True, dtype=dtype)
        try:
            pipeline.load_lora_weights(file.parent, weight_name=file.name)
        except (KeyError, ValueError) as error:  # names that it cannot take apart
            raise _unread(stage, f"{type(error).__name__}: {one_line(str(error))}") from None
    _check_adapter(stage, pipeline.unet)
    return pipeline


def _check_adapter(stage: Stage, unet: Any) -> None:
    """Compare what diffusers has read with what was saved: layers that it does not know, it leaves out."""
    adapter, saved = stage.facts.adapter, stage.checkpoint.weights(stage.weights)
    assert adapter is not None
    name = next(iter(getattr(unet, "peft_config", {})), "")
    there = adapter_weights(unet, name)
    lost = [key for key, tensor in saved.items() if key not in there or not _is_rounded(there[key], tensor)]
    if lost or there.keys() != saved.keys():
        raise _unread(stage, f"{len(lost)} of {len(saved)} tensors are not what they were")
    if adapter_scales(unet, name) != {adapter.alpha / adapter.rank}:
        raise _unread(stage, "its alpha is lost")


def _is_rounded(read: Tensor, saved: Tensor) -> bool:
    """Whether one is the other, to what fp16 or bf16 make of it."""
    return read.shape == saved.shape and torch.allclose(read.float().cpu(), saved.float(), rtol=0.01, atol=1e-6)


def _unread(stage: Stage, why: str) -> ContractError:
    return ContractError(
        f"diffusers does not read the adapter of {stage.folder} back ({why}); other programs may: --no-prove hands it "
        "over without this proof"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' bars and remarks off our lines."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    levels = of_diffusers.get_verbosity(), of_transformers.get_verbosity()
    for library in (of_diffusers, of_transformers):
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        yield
    finally:
        of_diffusers.set_verbosity(levels[0])
        of_transformers.set_verbosity(levels[1])


def _serves(name: str, contract: Any) -> bool:
    from shared.errors import ConfigError

    try:
        make_scheduler(name, contract)
    except ConfigError:
        return False
    return True


def _timesteps(name: str, contract: Any, steps: int) -> list[float]:
    scheduler = make_scheduler(name, contract)
    scheduler.set_timesteps(steps)
    return [float(t) for t in scheduler.timesteps]


def _few_steps(name: str, stages: Sequence[Stage]) -> int:
    """The least number of steps, from 4, of which every stage has one."""
    contract = stages[0].card.contract
    for steps in range(4, MOST_STEPS + 1):
        timesteps = _timesteps(name, contract, steps)
        if all(any(t in stage.facts.timesteps for t in timesteps) for stage in stages):
            return steps
    return MOST_STEPS


def _draw_part(pipeline: Any, stage: Stage, steps: int, drawn: _Drawn) -> None:
    asked: list[float] = []
    hook = pipeline.unet.register_forward_pre_hook(lambda unet, inputs: asked.append(float(inputs[1])))
    pipeline.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {
        "prompt": "",
        "num_inference_steps": steps,
        "generator": drawn.generator,
        "output_type": "latent",
        "denoising_end": stage.ends,
    }
    if stage.number == 1:
        settings |= dict.fromkeys(("height", "width"), LATENT_SIZE * pipeline.vae_scale_factor)
    else:
        settings |= {"denoising_start": stage.starts, "image": drawn.latents}
    drawn.latents = pipeline(**settings).images
    hook.remove()
    strays = [t for t in asked if t not in stage.facts.timesteps]
    if strays or not asked or not torch.isfinite(drawn.latents).all():
        fault = f"was asked at t = {strays[0]:g}" if strays else "made no step" if not asked else "gives no picture"
        raise ContractError(f"{stage.folder} answers for {stage.facts.timesteps} and {fault}: not a sound bundle")
    drawn.timesteps += asked


def _check(name: str, contract: Any, steps: int, drawn: _Drawn) -> None:
    expected = _timesteps(name, contract, steps)
    if drawn.timesteps != expected:
        raise ContractError(f"{name}: the stages made steps at {drawn.timesteps}, the schedule has {expected}")
