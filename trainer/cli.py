"""Doors of this tower: parse, load, call one function, one line on an error. Nothing heavy is imported for --help."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer

from shared.command import run_command, yield_idle_threads
from shared.errors import ConfigError
from trainer import options

if TYPE_CHECKING:
    from trainer.run import Request

Value = TypeVar("Value")


def _train_expert(
    store: options.StorePath,
    model: options.Model,
    output: options.Output,
    config: options.Configs = None,
    manifest: options.Name = "main",
    sets: options.Sets = None,
    device: options.Device = "auto",
    move_to_manifest: options.Move = None,
    start: options.Start = None,
    partner: options.Partner = None,
    dry_run: options.DryRun = False,
    timing: options.Timing = True,
    json: options.Json = False,
    wait: options.Wait = False,
    model_config: options.ModelConfig = None,
) -> None:
    """Train one expert from a store; run it twice at once, with base.toml and with refiner.toml."""
    from shared.config import load_config
    from shared.model_folder import resolve_model
    from trainer.config import ExpertConfig

    settings = load_config(ExpertConfig, config or [], sets or [])
    if wait:
        from trainer.waiting import wait_for_manifest

        wait_for_manifest(store, move_to_manifest or manifest)
    model_folder = resolve_model(model, ("unet",), model_config)
    from trainer.run import Request

    request = Request(settings, store, manifest, model_folder, output, device, move_to_manifest, start, partner)
    if dry_run:
        _rehearse(request, timing, json)
        return
    from trainer.loop import train_expert as train

    steps = train(request)
    typer.echo(f"expert {settings.name} is trained: {steps} steps, in {output}")


def _rehearse(request: "Request", timing: bool, as_json: bool) -> None:
    from json import dumps

    from trainer.rehearsal import rehearse, require_room

    report = rehearse(request, with_timing=timing)
    for line in [dumps(report.as_json())] if as_json else report.lines():
        typer.echo(line)
    require_room(report, request.output)


def _generate_images(
    expert: options.Experts,
    model: options.Model,
    out: options.Out,
    prompt: options.Prompts = None,
    prompts: options.PromptFile = None,
    expert_prompt: options.ExpertPrompts = None,
    steps: options.Steps = 40,
    guidance: options.Guidance = None,
    guidance_rescale: options.Rescale = None,
    scheduler: options.Scheduler = "unipc",
    seed: options.Seed = 0,
    count: options.Count = 1,
    negative_prompt: options.Negative = None,
    width: options.Size = None,
    height: options.Size = None,
    batch: options.Batch = 1,
    from_images: options.FromImages = None,
    start_timestep: options.StartAt = None,
    manifest: options.OfManifest = "main",
    limit: options.Limit = None,
    sheet: options.Sheet = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    offload: options.Offload = False,
    base: options.Base = None,
    model_config: options.ModelConfig = None,
) -> None:
    """Draw with a pair of experts: each step is made by the expert whose range its timestep lies in."""
    from shared.model_folder import resolve_model
    from trainer.drawing import GenerateRequest
    from trainer.drawn import needed_components, resolve_base
    from trainer.ensemble import DrawSettings
    from trainer.generate import generate

    weights = _once_or_each(guidance or [9.2])
    request = GenerateRequest(
        experts=expert,
        model=resolve_model(model, needed_components(expert), model_config),
        prompts=_asked_for(prompt or [], prompts, expert_prompt, needs_some=from_images is None),
        out=out,
        settings=DrawSettings(steps, weights, guidance_rescale, scheduler),
        negative_prompt=_once_or_each(negative_prompt or [None]),
        seed=seed,
        count=count,
        height=height,
        width=width,
        device=device,
        base=resolve_base(base),
        batch=batch,
        precision=precision,
        offload=offload,
        sheet=sheet,
        from_images=from_images,
        manifest=manifest,
        start_timestep=start_timestep,
        limit=limit,
    )
    for path in generate(request):
        typer.echo(str(path))


def _asked_for(
    prompt: list[str], file: Path | None, expert_prompt: list[str] | None, *, needs_some: bool
) -> list[str | tuple[str, ...]]:
    """The prompts to draw: one for all experts, or a tuple of one for each."""
    from trainer.generate import read_prompts

    asked: list[str | tuple[str, ...]] = [] if expert_prompt is None else [tuple(expert_prompt)]
    if file is not None or prompt or (needs_some and not asked):
        asked += read_prompts(prompt, file)
    return asked


def _once_or_each(given: Sequence[Value]) -> Value | tuple[Value, ...]:
    """What was given once for all experts, or once for each."""
    return given[0] if len(given) == 1 else tuple(given)


def _bundle_experts(
    expert: options.Experts,
    model: options.Model,
    out: options.BundleOut,
    form: options.BundleForm = "diffusers",
    raw: options.Raw = False,
    merge: options.Merge = None,
    merge_adapters: options.MergeAdapters = False,
    dtype: options.BundleDtype = None,
    base: options.Base = None,
    prove: options.Prove = True,
    device: options.Device = "auto",
    model_config: options.ModelConfig = None,
    store: options.MergeStore = None,
    manifest: options.ManifestName = None,
    draws: options.Draws = 256,
) -> None:
    """Hand a pair over as what other programs load: diffusers folders, ComfyUI's checkpoints, or LoRA files."""
    from shared.model_folder import resolve_model
    from trainer.bundle import BundleRequest, bundle
    from trainer.drawn import needed_components, resolve_base

    folder, base = resolve_model(model, needed_components(expert), model_config), resolve_base(base)
    request = BundleRequest(
        expert, folder, out, form, raw, merge, merge_adapters, dtype, base, prove, device, store, manifest, draws
    )
    typer.echo(str(bundle(request)))


def _evaluate_experts(
    expert: options.Experts,
    store: options.StorePath,
    model: options.Model,
    out: options.ReportOut,
    manifest: options.ManifestName = None,
    draws: options.Draws = 256,
    batch: options.EvalBatch = 4,
    prompt: options.Prompts = None,
    prompts: options.PromptFile = None,
    clip: options.Clip = None,
    held_out: options.EvalHeldOut = 4,
    steps: options.Steps = 40,
    guidance: options.EvalGuidance = 9.2,
    guidance_rescale: options.Rescale = None,
    scheduler: options.Scheduler = "unipc",
    seed: options.EvalSeed = 0,
    watch: options.Watch = False,
    max_share: options.MaxShare = 0.2,
    tracker: options.Tracker = None,
    precision: options.Precision = "auto",
    device: options.Device = "auto",
    base: options.Base = None,
    model_config: options.ModelConfig = None,
) -> None:
    """Judge experts beside their start model: losses by timestep, pictures, every way to pair them, in one report."""
    from shared.model_folder import COMPONENTS, resolve_clip, resolve_model
    from trainer.drawn import resolve_base
    from trainer.ensemble import DrawSettings
    from trainer.evaluate import EvaluateRequest, evaluate
    from trainer.gallery import PictureWish
    from trainer.generate import read_prompts

    wish = PictureWish(
        prompts=read_prompts(prompt or [], prompts) if prompt or prompts else (),
        settings=DrawSettings(steps, guidance, guidance_rescale, scheduler),
        seed=seed,
        held_out=held_out,
        precision=precision,
        batch=batch,
        clip=resolve_clip(clip) if clip else None,
    )
    request = EvaluateRequest(
        experts=expert,
        store=store,
        model=resolve_model(model, COMPONENTS if wish.prompts or held_out else ("unet", "scheduler"), model_config),
        out=out,
        manifest=manifest,
        device=device,
        draws=draws,
        batch=batch,
        base=resolve_base(base),
        pictures=wish,
    )
    if tracker and not watch:
        raise ConfigError("--tracker draws the curves of --watch: give that too")
    if watch:
        from trainer.watch import watch as follow

        typer.echo(str(follow(request, max_share, tracker or ())))
        return
    typer.echo(str(evaluate(request)))


def train_expert() -> None:
    """Console script `train-expert`."""
    yield_idle_threads()
    run_command(_train_expert)


def generate_images() -> None:
    """Console script `generate-images`."""
    yield_idle_threads()
    run_command(_generate_images)


def evaluate_experts() -> None:
    """Console script `evaluate-experts`."""
    yield_idle_threads()
    run_command(_evaluate_experts)


def bundle_experts() -> None:
    """Console script `bundle-experts`."""
    yield_idle_threads()
    run_command(_bundle_experts)
