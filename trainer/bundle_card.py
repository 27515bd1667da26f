"""Cards of a bundle: how the stages draw together in somebody else's program, and what each is."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from trainer.adapter import ADAPTER_FILE
from trainer.bundle_stage import Stage
from trainer.comfy import STEPS, WORKFLOW_FILE, null_node, step_range
from trainer.merge_loss import WholeLoss
from trainer.model_card import code, fence, front_matter


def bundle_card(stages: Sequence[Stage], form: str, model: str, losses: Sequence[WholeLoss] = ()) -> str:
    """README.md of the bundle, Markdown with a front matter as the Hub reads it."""
    contract = stages[0].card.contract
    cuts = " and ".join(str(stage.facts.low) for stage in stages[:-1])
    about = (
        _blended(stages[0]) if stages[0].blend else
        f"{len(stages)} experts that draw one picture together, handed over at timestep {cuts} of "
        f"{contract.num_timesteps} (0 is clean)." if cuts else "One expert for all timesteps."
    )  # fmt: skip
    return "\n\n".join(
        (
            front_matter(stages[0].facts, _extra(stages)),
            f"# {' + '.join(code(stage.facts.name) for stage in stages)}",
            about,
            "\n".join(f"- {_line(stage)}" for stage in stages),
            *_losses(losses),
            "## How to draw with it",
            how_to_draw(stages, form, model),
            *_comfy(stages, form),
            _settings(stages),
            "`pair.json` says all of this to programs. Each stage's `expert/` holds the card and the facts of the "
            "checkpoint that it was made of.",
        )
    ) + "\n"  # fmt: skip


def stage_card(stage: Stage, form: str, model: str) -> str:
    """README.md of one stage."""
    facts = stage.facts
    fractions = [f"{key}={value:g}" for key, value in _fractions(stage)]
    base = model if stage.is_on_model else facts.base_model or "another"
    asked = f" Ask its pipeline for its own part alone: {code(', '.join(fractions))}." if fractions else ""
    return "\n\n".join(
        (
            front_matter(facts, _extra([stage])),
            f"# {code(facts.name)}: {_line(stage)}",
            f"Stage {stage.number} of {stage.count} of a bundle; the card beside this folder says how they draw "
            f"together.{asked}",
            f"What it was made of: [expert/README.md](expert/README.md). Base model: {code(base)}.",
        )
    ) + "\n"  # fmt: skip


def how_to_draw(stages: Sequence[Stage], form: str, model: str) -> str:
    """A script, or what to open, for the form."""
    lines = ["import torch", f"from diffusers import {', '.join(_needed(stages))}", "", 'BUNDLE = "THIS FOLDER"']
    lines += _bases(stages, model)
    lines.append(f'settings = {{"prompt": "a cat on a wall", "num_inference_steps": 40, {_guidance(stages[0])}}}')
    for stage in stages:
        lines += ["", *_load(stage, form), *_draw(stage)]
    lines.append('image[0].save("picture.png")')
    return fence("\n".join(lines), "python")


def _comfy(stages: Sequence[Stage], form: str) -> Iterator[str]:
    """What people do with the workflow: where the files go, and which settings belong together."""
    place = {"single-file": "models/checkpoints", "kohya-lora": "models/loras"}.get(form)
    if place is None:
        return
    files = " and ".join(f"`{stage.folder}.safetensors`" for stage in stages)
    base = " It names the checkpoints that they stand on: put your files' names there." * (form == "kohya-lora")
    yield f"`{WORKFLOW_FILE}` is for ComfyUI; {files} go into its `{place}`.{base}"
    for earlier, later in pairwise(stages):
        at = {steps: step_range(later, steps)[0] for steps in (STEPS, 20, 30, 50)}
        yield (
            f"`{later.folder}_sampler` starts where `{earlier.folder}_sampler` ends, at step {at[STEPS]} of {STEPS}. "
            f"Who changes `steps` changes both, and that step in both: {at[20]} of 20, {at[30]} of 30, {at[50]} of 50."
        )
    if own := [stage.folder for stage in stages if stage.facts.layout == "sdxl-refiner"]:
        yield f"The prompts of {' and '.join(own)} say `width` and `height` too: change them with the picture's."
    if zeros := [f"`{null_node(stage)}`" for stage in stages if stage.facts.null_prompt == "zeros"]:
        yield (
            f"Without a negative prompt it draws against zeros, as in training. For one, bypass {' and '.join(zeros)} "
            "(Ctrl+B on the canvas) and type it into the node before."
        )


def _bases(stages: Sequence[Stage], model: str) -> Iterator[str]:
    """Names of what adapters stand on: the bundle's model, or what an expert of its own began with."""
    adapters = [stage for stage in stages if stage.is_adapter]
    if any(stage.is_on_model for stage in adapters):
        yield f'BASE = "{_safe(model)}"  # the model that the adapters stand on'
    for stage in adapters:
        start, number = stage.facts.start, stage.number
        if not stage.is_on_model:
            own = _safe(stage.facts.base_model or "ITS MODEL")
            yield f'BASE_{number} = "{own}"  # the model that the adapter of {stage.folder} was trained with'
        if not stage.is_on_model and start:
            step = f"step {start.step} of {_safe(start.name)}"
            yield f'UNET_{number} = "{start.weights}"  # the UNet on which it stands, of {step}'


def _blended(stage: Stage) -> str:
    assert stage.blend is not None
    own, other, share = stage.checkpoint.card.facts, stage.blend.other.facts, stage.blend.share
    return (
        f"One model for all timesteps, {1 - share:g} of {code(own.name)} ({own.timesteps}) and {share:g} of "
        f"{code(other.name)} ({other.timesteps}): every weight lies on the line between theirs (Wortsman et al. 2022, "
        "arXiv:2109.01903)."
    )


def _losses(losses: Sequence[WholeLoss]) -> Iterator[str]:
    if not losses:
        return
    rows = "\n".join(f"| {code(one.name)} | {one.loss:.5f} | {one.change:+.2%} |" for one in losses)
    head = "| on the same held-out draws | eval loss | against the start model |\n|---|---|---|"
    yield f"## What it costs\n\n{head}\n{rows}"


def _load(stage: Stage, form: str) -> list[str]:
    name, kind = stage.folder, _pipeline(stage)
    folder = f'f"{{BUNDLE}}/{name}"'
    source = _base(stage) if stage.is_adapter else folder
    if stage.is_adapter:  # whose base may have another null prompt than it was trained with
        source += f", force_zeros_for_empty_prompt={stage.facts.null_prompt == 'zeros'}"
    lines = [f"{name} = {kind}.from_pretrained({source})"]
    if form == "single-file":
        lines = [f'{name} = {kind}.from_single_file(f"{{BUNDLE}}/{name}.safetensors", config={folder})']
    if stage.is_adapter:
        where = (
            'BUNDLE, weight_name="' + f'{name}.safetensors"'
            if form == "kohya-lora"
            else f'{folder}, weight_name="{ADAPTER_FILE}"'
        )
        lines.append(f"{name}.load_lora_weights({where})")
    lines.append(
        f"{name}.scheduler = UniPCMultistepScheduler.from_pretrained({folder}, subfolder=\"scheduler\")"
    )  # fmt: skip
    return lines


def _base(stage: Stage) -> str:
    """What its pipeline is loaded with, in the script."""
    if stage.is_on_model:
        return "BASE"
    base, unet = f"BASE_{stage.number}", f"UNET_{stage.number}"
    return f"{base}, unet=UNet2DConditionModel.from_pretrained({unet})" if stage.facts.start else base


def _draw(stage: Stage) -> list[str]:
    given = ["**settings", *(f"{key}={value:g}" for key, value in _fractions(stage))]
    given += [] if stage.number == 1 else ["image=image"]
    given += [] if stage.number == stage.count else ['output_type="latent"']
    return [f"image = {stage.folder}({', '.join(given)}).images"]


def _needed(stages: Sequence[Stage]) -> list[str]:
    begun = any(stage.is_adapter and not stage.is_on_model and stage.facts.start for stage in stages)
    unet = ["UNet2DConditionModel"] if begun else []
    return [*sorted({_pipeline(stage) for stage in stages}), *unet, "UniPCMultistepScheduler"]


def _pipeline(stage: Stage) -> str:
    return "StableDiffusionXLPipeline" if stage.number == 1 else "StableDiffusionXLImg2ImgPipeline"


def _guidance(stage: Stage) -> str:
    rescale = ', "guidance_rescale": 0.7' if stage.card.contract.zero_terminal_snr else ""
    return f'"guidance_scale": 7.5{rescale}'


def _fractions(stage: Stage) -> list[tuple[str, float]]:
    edges = (("denoising_start", stage.starts), ("denoising_end", stage.ends))
    return [(key, value) for key, value in edges if value is not None]


def _line(stage: Stage) -> str:
    facts = stage.facts
    kind = f"an adapter ({facts.adapter.kind})" if facts.adapter and stage.is_adapter else "a whole UNet"
    averaged = "averaged" if stage.weights == "ema" else "raw"
    made_of = " and of ".join(f"step {own.state.step} of {code(own.card.facts.name)}" for own in stage.checkpoints)
    return f"{code(stage.folder)}: timesteps {facts.timesteps}, {kind}, {averaged} weights of {made_of}"


def _settings(stages: Sequence[Stage]) -> str:
    contract = stages[0].card.contract
    rescaled = "with zero-terminal SNR" if contract.zero_terminal_snr else "without zero-terminal SNR"
    return (
        f"The experts predict {code(contract.prediction_type)} on a {contract.beta_schedule} schedule {rescaled}, with "
        f"steps placed {code(contract.timestep_spacing)}; `scheduler/` says so, to UniPC and to whatever is made from "
        "its config. Schedulers without a history (DDIM, Euler) draw what one loop over both stages draws; with one, "
        "the second stage begins without it."
    )


def _extra(stages: Sequence[Stage]) -> dict[str, object]:
    return {
        "sdxl_experts": {
            "timesteps": [[stage.facts.low, stage.facts.high] for stage in stages],
            "num_timesteps": stages[0].card.contract.num_timesteps,
        }
    }


def _safe(text: str) -> str:
    return "".join(char for char in text if char.isprintable() and char not in '"\\')
