"""What the start model reaches, measured, and the card that says so: MODEL/scores.json and MODEL/README.md."""

import json
import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image

from demo.captions import describe
from demo.clip_score import clip_cosines
from demo.detail import measure_detail
from demo.draw import draw
from demo.judge import judge, lends_its_kind
from demo.pipeline import draw_with_pipeline
from demo.prompts import PICTURE_HW, PROMPTS_SEED, SETS, SIZES_HW, make_prompts, set_of
from demo.scene import KINDS, Scene, make_scene
from demo.score import judge_pictures, score_sets
from demo.train_vae import psnr_db
from shared.vae import Vae

STEPS, GUIDANCE = 30, 2.5
PROMPTS = 100  # of each set
RECONSTRUCTED = 128  # held-out pictures of each size
RETRIEVED = 256

CARD = """# The small world's start model

A model in SDXL's diffusers layout that draws one or two shapes on a quiet ground: AutoencoderKL, two CLIP text
encoders, a UNet trained over the whole schedule (v-prediction, zero-terminal SNR, trailing spacing), and the small CLIP
that the second text encoder belongs to (`clip/`, for scores; pipelines do not load it). It is what SSD-1B is to a real
run: the model that both experts begin with. Weights are fp16; {megabytes:.1f} MB in all.

    from diffusers import StableDiffusionXLPipeline
    pipeline = StableDiffusionXLPipeline.from_pretrained("demo/model", use_safetensors=True)
    pipeline("{example}", height={height}, width={width}).images[0]

## How it was made

`python -m demo.train_tiny OUT`, from random weights and drawn pictures alone ({made_on}):

{made}

Every batch is a function of a seed and the step, and a stopped run goes on where it was; the same bits come out only
with the same library versions, processor and number of threads. These weights were made with interruptions: the VAE's
first 200 steps ran on one thread and all of it under an earlier form of the optimizer's clipping and weight decay; the
average of the UNet's third run went through fp16, and from the fourth on they ran on one thread but for 189 steps; the
text encoders had their second and third fits, from fp16 weights, before "windows" and "twins"; "pairs" began with fp16
weights. Up to "close" the embeds were of size 16 to 19, not 1, and had saturated the UNet's cross-attention: four of
its seven layers gave one and the same for every caption and place. Before "attend" their weights were drawn anew, each
layer first giving what it had given on average; from there on the embeds were divided by 16 as they were read, and two
processes trained, 64 a step each; the heads were fitted before "look" by an earlier form of `demo.attention_fit`. So
the command above gives weights like these and not these bits. None of the combinations of kind and colour that
`demo.scene.held_out_combinations` names was ever shown to it. The words are those of `demo.captions.WORDS`.

## What it reaches

Measured by `python -m demo.train_tiny OUT --stage measure` on pictures and captions that nothing was trained on
(`scores.json` has all numbers).

| VAE, {reconstructed} held-out pictures of {sizes} | |
|---|---|
| PSNR, mean over pictures | {vae[psnr_db]:.2f} dB |
| PSNR of the mean error | {vae[pooled_psnr_db]:.2f} dB |
| reconstructions in which the judge sees what was drawn | {vae[follows]:.1%} |
| sharpness of edges (1 = as drawn) | {vae[sharpness]:.2f} |

| CLIP, {retrieved} pictures and their full captions | |
|---|---|
| caption found for the picture, first of {retrieved} | {clip[caption_found]:.1%} |
| picture found for the caption | {clip[picture_found]:.1%} |
| of 8 captions that differ in the kind alone, the right one | {clip[kind_found]:.1%} |
| of 2 captions in which two shapes have each other's places, the right one | {clip[place_found]:.1%} |

Drawn by diffusers' StableDiffusionXLPipeline, UniPC, {steps} steps, guidance {guidance}, {height} x {width} px, a seed
each, and judged without a network (`demo.judge`):

| {prompts} prompts each | follows | kind | colour | relation | size | position | ground | sharpness | CLIP |
|---|---|---|---|---|---|---|---|---|---|
{drawn}

"Follows" is the number of shapes, each one's kind and colour, and how they stand, all right in one picture.

Of {wrong_kind} pictures of two shapes with a wrong kind {lent_kind} have the other shape's; before the UNet's
cross-attention was begun anew and shown where to look (run `look`) that was 22 of 47, and 52 of 100 were followed.
"""


def write_card(model: Path, device: str) -> dict[str, Any]:
    """Measure the model and write what it reaches beside it; returns the numbers."""
    scores: dict[str, Any] = {"vae": measure_vae(model, device), "clip": measure_clip(model), "drawn": {}}
    prompts = make_prompts(PROMPTS)
    seeds = range(len(prompts))
    pictures = draw_with_pipeline(model, prompts, PICTURE_HW, steps=STEPS, guidance=GUIDANCE, seeds=seeds)
    judged = judge_pictures(pictures, prompts, [Path()] * len(prompts), model / "clip")
    scores["drawn"] = {name: score.as_json() for name, score in score_sets(judged).items()}
    scores["lent_kind"] = sum(
        lends_its_kind(picture, one.prompt) and not one.verdict.kind
        for picture, one in zip(pictures, judged, strict=True)
        if set_of(one.prompt) == "two"
    )
    (model / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    (model / "README.md").write_text(_card(model, scores), encoding="utf-8")
    return scores


def measure_vae(model: Path, device: str) -> dict[str, float]:
    """Reconstructions, from the mean of the posterior, of held-out pictures of the sizes that the model draws."""
    from demo.train_vae import draw_batch

    vae = Vae(model, device)
    psnrs, follows, sharpness = [], [], []
    for size_hw in SIZES_HW:
        pixels = draw_batch(PROMPTS_SEED, 0, RECONSTRUCTED, size_hw, held_out=True)
        scenes = [make_scene(PROMPTS_SEED, i, held_out=True, sizes_hw=(size_hw,)) for i in range(RECONSTRUCTED)]
        made = vae.decode(vae.encode(pixels).mean * vae.scaling_factor)
        psnrs.append(psnr_db(made, pixels))
        for scene, picture in zip(scenes, (Image.fromarray(array.numpy()) for array in made), strict=True):
            follows.append(judge(picture, scene).follows)
            sharpness.append(measure_detail(picture, draw(scene)).sharpness)
    each = torch.cat(psnrs)
    pooled = -10 * torch.log10((10 ** (-each / 10)).mean())
    numbers = {"psnr_db": float(each.mean()), "pooled_psnr_db": float(pooled)}
    return numbers | {"follows": fmean(follows), "sharpness": fmean(sharpness)}


def measure_clip(model: Path) -> dict[str, float]:
    """Of all captions the picture's own, and of all pictures the caption's own: shares found first."""
    scenes: list[Scene] = [make_scene(PROMPTS_SEED, i, sizes_hw=(PICTURE_HW,)) for i in range(RETRIEVED)]
    pictures, captions = [draw(scene) for scene in scenes], [describe(scene)[0] for scene in scenes]
    cosines = clip_cosines(model / "clip", pictures, captions, every=True)
    own = torch.arange(len(scenes))
    table = torch.tensor(cosines).view(len(scenes), len(scenes))
    found = {"caption_found": table.argmax(1) == own, "picture_found": table.argmax(0) == own}
    shares = {name: float(hits.float().mean()) for name, hits in found.items()}
    return shares | {"kind_found": _kind_found(model), "place_found": _place_found(model)}


def _kind_found(model: Path) -> float:
    """Share of pictures of one shape whose own caption is found among those that differ in the shape's kind alone."""
    several = (make_scene(PROMPTS_SEED, i, sizes_hw=(PICTURE_HW,)) for i in range(2 * RETRIEVED))
    alone = [scene for scene in several if len(scene.shapes) == 1][: RETRIEVED // 2]
    captions = [
        describe(replace(scene, shapes=(replace(scene.shapes[0], kind=kind),)))[0] for scene in alone for kind in KINDS
    ]
    found = _found_among_own(model, alone, captions)
    return fmean(KINDS[kind] == scene.shapes[0].kind for kind, scene in zip(found, alone, strict=True))


def _place_found(model: Path) -> float:
    """Share of pictures of two shapes whose caption is found rather than the one with both in each other's place."""
    several = (make_scene(PROMPTS_SEED, i, sizes_hw=(PICTURE_HW,)) for i in range(2 * RETRIEVED))
    pairs = [scene for scene in several if len(scene.shapes) == 2][: RETRIEVED // 2]
    captions = [describe(each)[0] for scene in pairs for each in (scene, _exchanged(scene))]
    return fmean(at == 0 for at in _found_among_own(model, pairs, captions))


def _exchanged(scene: Scene) -> Scene:
    first, second = scene.shapes
    pairs = ((first, second), (second, first))
    return replace(scene, shapes=tuple(replace(one, kind=two.kind, colour=two.colour) for one, two in pairs))


def _found_among_own(model: Path, scenes: list[Scene], captions: list[str]) -> list[int]:
    """For the picture of each scene, which of its own captions, equally many of each, is nearest to it."""
    cosines = clip_cosines(model / "clip", [draw(scene) for scene in scenes], captions, every=True)
    table = torch.tensor(cosines).view(len(scenes), len(scenes), -1)
    return [int(at) for at in table[range(len(scenes)), range(len(scenes))].argmax(1)]


def _card(model: Path, scores: Mapping[str, Any]) -> str:
    columns = ("follows", "kind", "colour", "relation", "size", "position", "ground")
    rows = []
    for name, numbers in scores["drawn"].items():
        shares = " | ".join(f"{numbers[column]:.1%}" for column in columns)
        rows.append(f"| {SETS[name]} | {shares} | {numbers['sharpness']:.2f} | {numbers['clip']:.1f} |")
    return CARD.format(
        megabytes=sum(path.stat().st_size for path in model.rglob("*.safetensors")) / 1e6,
        example=make_prompts(1)[0],
        made_on=f"torch {torch.__version__}, {platform.machine()}",
        made=_how_made(model),
        reconstructed=RECONSTRUCTED * len(SIZES_HW),
        sizes=", ".join(f"{w} x {h}" for h, w in SIZES_HW),
        retrieved=RETRIEVED,
        steps=STEPS,
        guidance=GUIDANCE,
        height=PICTURE_HW[0],
        width=PICTURE_HW[1],
        prompts=PROMPTS,
        drawn="\n".join(rows),
        wrong_kind=round(PROMPTS * (1 - scores["drawn"]["two"]["kind"])),
        lent_kind=scores["lent_kind"],
        vae=scores["vae"],
        clip=scores["clip"],
    )


def _how_made(model: Path) -> str:
    from safetensors import safe_open

    from demo.train_tiny import CLIP_PLAN, CLOSE_PLAN, TWIN_PLAN, VAE_PLAN
    from demo.unet_plan import MUON_RATE, PICTURE_SETS, UNET_RUNS

    def millions(part: str) -> str:
        count = 0
        for path in (model / part).glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                count += sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118
        return f"{count / 1e6:.2f} M"

    towers = f"{millions('text_encoder')} and {millions('text_encoder_2')}"
    pictures = {
        name: f"{of.count} pictures of {', '.join(f'{w} x {h}' for h, w in of.sizes_hw)}"
        + f" and {of.wide} windows into larger ones" * bool(of.wide)
        for name, of in PICTURE_SETS.items()
    }
    runs = [
        f"  {number}. `{plan.name}`, {pictures[plan.pictures]}: timesteps {plan.timesteps[0]} to "
        f"{plan.timesteps[1] - 1}, {plan.batch} a step, "
        f"Muon at {', '.join(f'{MUON_RATE * rate:g} to step {n}' for n, rate in plan.stages)}"
        + "".join(f", `{told}`" for told in plan.sets)
        + ", a head of each cross-attention fitted first (`demo.attention_fit`)" * plan.fit_heads
        + ";"
        for number, plan in enumerate(UNET_RUNS, 1)
    ]
    return "\n".join(
        (
            f"- VAE ({millions('vae')} parameters): {VAE_PLAN.steps} steps of {VAE_PLAN.batch} drawn pictures, Muon.",
            f"- CLIP ({millions('clip')}; text encoders {towers}): {CLIP_PLAN.steps} steps of {CLIP_PLAN.batch} "
            f"pictures and captions, both text towers against one vision tower; then {CLOSE_PLAN.steps} steps, Muon, "
            "mostly of scenes that differ in little and whose captions say in what; then "
            f"{TWIN_PLAN.steps} in which most differ in what stands where alone.",
            f"- UNet ({millions('unet')}): `cache-build` on drawn pictures with four captions each, then "
            "`train-expert`, each run from the averaged weights of the one before:",
            *runs,
        )
    )
