"""A ComfyUI workflow that draws with a bundle: a sampler for each stage, one going on where the other stops.

    stages -> checkpoint_workflow, lora_workflow -> workflow.json, as ComfyUI's API takes it; its canvas opens that too

Weights are named as they lie in the bundle, and stand in ComfyUI's models/checkpoints or models/loras.
"""

from collections.abc import Sequence
from typing import Any

from shared.contract import PairContract
from trainer.bundle_stage import Stage

WORKFLOW_FILE = "workflow.json"
STEPS, GUIDANCE, RESCALE = 40, 7.5, 0.7  # to be changed there
_TO_THE_END = 10000  # however many steps there are, as ComfyUI has it by default
_PLACING = {"trailing": "simple", "leading": "ddim_uniform", "linspace": "normal"}  # ComfyUI's words for them
_SAMPLING = {"epsilon": "eps", "v_prediction": "v_prediction"}
Node = dict[str, Any]


def checkpoint_workflow(stages: Sequence[Stage]) -> dict[str, Node]:
    """The workflow of whole models in single files, each with its own text encoders: node by name.

    The samplers' scheduler is the one that places steps as the contract says. What a UNet predicts is set by a node of
    its own: ComfyUI reads a file's `v_pred` for SDXL's base layout, and takes every stock refiner's to predict noise.
    """
    nodes = {stage.folder: _node("CheckpointLoaderSimple", ckpt_name=f"{stage.folder}.safetensors") for stage in stages}
    return _drawn(nodes, stages, [stage.folder for stage in stages])


def lora_workflow(stages: Sequence[Stage], bases: Sequence[str]) -> dict[str, Node]:
    """The workflow of adapters on checkpoints, `bases` naming each stage's file, each loaded once: node by name."""
    names = {file: f"base_{n}" if n > 1 else "base" for n, file in enumerate(dict.fromkeys(bases), 1)}
    nodes = {name: _node("CheckpointLoaderSimple", ckpt_name=file) for file, name in names.items()}
    for stage, file in zip(stages, bases, strict=True):
        nodes[stage.folder] = _node(
            "LoraLoaderModelOnly", model=[names[file], 0], lora_name=f"{stage.folder}.safetensors", strength_model=1.0
        )
    return _drawn(nodes, stages, [names[file] for file in bases])


def step_range(stage: Stage, steps: int) -> tuple[int, int]:
    """The first of `steps` that is a stage's, and the first beyond: where its sampler starts and ends."""
    timesteps = comfy_timesteps(stage.card.contract, steps)
    begin, end = (sum(t >= edge for t in timesteps) for edge in (stage.facts.high, stage.facts.low))
    return begin, end


def comfy_timesteps(contract: PairContract, steps: int) -> list[float]:
    """Timesteps at which ComfyUI asks a model for so many steps, highest first, as it places them for a contract."""
    count = contract.num_timesteps
    if contract.timestep_spacing == "trailing":
        stride = count / steps  # rounded before it is multiplied, as there: 19 of 38 strides fall just short of 500
        return [float(count - 1 - int(index * stride)) for index in range(steps)]
    if contract.timestep_spacing == "leading":
        return [float(t) for t in reversed(range(1, count, max(count // steps, 1)))]
    return [(count - 1) * (1 - index / max(steps - 1, 1)) for index in range(steps)]


def null_node(stage: Stage) -> str:
    """Name of the node that puts zeros in the place of a stage's negative prompt, where it learnt zeros for none."""
    return f"{stage.folder}_null"


def _drawn(nodes: dict[str, Node], stages: Sequence[Stage], files: Sequence[str]) -> dict[str, Node]:
    """`nodes`, and what draws with them; `files` are those that give each stage its text encoders and VAE."""
    pixels = 8 * int(stages[0].config()["sample_size"])
    nodes["latent"] = _node("EmptyLatentImage", width=pixels, height=pixels, batch_size=1)
    latent = ["latent", 0]
    for stage, file in zip(stages, files, strict=True):
        nodes[f"{stage.folder}_positive"] = _prompt(stage, file, "positive", "a cat on a wall", pixels)
        against = _add_negative(nodes, stage, file, pixels)
        model = _add_schedule(nodes, stage)
        nodes[f"{stage.folder}_sampler"] = _sampler(stage, model, against, latent)
        latent = [f"{stage.folder}_sampler", 0]
    nodes["decoded"] = _node("VAEDecode", samples=latent, vae=[files[-1], 2])
    nodes["saved"] = _node("SaveImage", images=["decoded", 0], filename_prefix="pair")
    return nodes


def _add_negative(nodes: dict[str, Node], stage: Stage, file: str, pixels: int) -> str:
    """Nodes for what stands against the prompt; returns the one for the sampler.

    An expert that learnt zeros for "no prompt" gets zeros, which no text is encoded to: one that is typed in counts
    once the node behind it is bypassed, and the titles say so on the canvas.
    """
    text, null = f"{stage.folder}_negative", null_node(stage)
    nodes[text] = _prompt(stage, file, "negative", "", pixels)
    if stage.facts.null_prompt == "encoded":
        return text
    nodes[text]["_meta"]["title"] += f": bypass {null} to use it"
    nodes[null] = _titled(null, _node("ConditioningZeroOut", conditioning=[text, 0]))
    return null


def _add_schedule(nodes: dict[str, Node], stage: Stage) -> list[Any]:
    """Nodes between a stage's weights and its sampler; returns where the model comes out."""
    name, contract = stage.folder, stage.card.contract
    nodes[f"{name}_schedule"] = _node(
        "ModelSamplingDiscrete",
        model=[name, 0],
        sampling=_SAMPLING[contract.prediction_type],
        zsnr=contract.zero_terminal_snr,
    )
    if not contract.zero_terminal_snr:
        return [f"{name}_schedule", 0]
    nodes[f"{name}_rescale"] = _node("RescaleCFG", model=[f"{name}_schedule", 0], multiplier=RESCALE)
    return [f"{name}_rescale", 0]


def _prompt(stage: Stage, file: str, sign: str, text: str, pixels: int) -> Node:
    clip, facts, title = [file, 1], stage.facts, f"{stage.folder} {sign} prompt"
    if facts.layout == "sdxl":
        return _titled(title, _node("CLIPTextEncode", clip=clip, text=text))
    score = facts.aesthetic_score if sign == "positive" else facts.negative_aesthetic_score
    node = _node("CLIPTextEncodeSDXLRefiner", clip=clip, text=text, ascore=score, width=pixels, height=pixels)
    return _titled(title, node)


def _sampler(stage: Stage, model: list[Any], against: str, latent: list[Any]) -> Node:
    begin, end = step_range(stage, STEPS)
    return _node(
        "KSamplerAdvanced",
        model=model,
        positive=[f"{stage.folder}_positive", 0],
        negative=[against, 0],
        latent_image=latent,
        add_noise="enable" if stage.number == 1 else "disable",
        noise_seed=0,
        steps=STEPS,
        cfg=GUIDANCE,
        sampler_name="euler",  # without a history, so that two samplers are one
        scheduler=_PLACING[stage.card.contract.timestep_spacing],
        start_at_step=begin,
        end_at_step=_TO_THE_END if stage.number == stage.count else end,
        return_with_leftover_noise="disable" if stage.number == stage.count else "enable",
    )


def _titled(title: str, node: Node) -> Node:
    """A node with what the canvas writes above it."""
    return node | {"_meta": {"title": title}}


def _node(kind: str, **inputs: Any) -> Node:
    return {"class_type": kind, "inputs": inputs}
