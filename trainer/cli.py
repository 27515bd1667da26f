"""Doors of this tower: parse, load, call one function, one line on an error. Nothing heavy is imported for --help."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared.command import run_command, yield_idle_threads

if TYPE_CHECKING:
    from trainer.run import Request

Configs = Annotated[list[Path] | None, typer.Option("--config", help="TOML file; several are layered, later ones win.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="One setting, e.g. optimizer.learning_rate=1e-6.")]
StorePath = Annotated[Path, typer.Option("--store", help="Store that cache-build made.")]
Name = Annotated[str, typer.Option("--manifest", help="Manifest to begin on; a run that goes on keeps its own.")]
Model = Annotated[
    str, typer.Option("--model", help="SDXL-layout model: a diffusers folder, a Hub id, or one .safetensors file.")
]
ModelConfig = Annotated[
    str | None,
    typer.Option(help="With --model FILE: folder or Hub id of its tokenizers and settings, if not beside it."),
]
Output = Annotated[Path, typer.Option("--output", help="Run folder; the same command goes on with what is in it.")]
Device = Annotated[str, typer.Option(help="auto, cuda, mps or cpu.")]
Start = Annotated[
    Path | None, typer.Option(help="Run folder or checkpoint of an expert whose weights training starts from.")
]
Move = Annotated[str | None, typer.Option(help="Go on with the newest manifest of this name, in a new epoch.")]

DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it would do and how long; write nothing.")]
Timing = Annotated[bool, typer.Option(help="With --dry-run: take a few steps to time them.")]
Json = Annotated[bool, typer.Option("--json", help="With --dry-run: one JSON object.")]

Experts = Annotated[
    list[Path], typer.Option("--expert", help="Run folder, checkpoint or best.json of an expert; give both.")
]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="What to draw; may be given again.")]
ExpertPrompts = Annotated[
    list[str] | None, typer.Option("--expert-prompt", help="In place of --prompt: one for each --expert, in order.")
]
PromptFile = Annotated[
    Path | None,
    typer.Option("--prompts", help="Prompts: a text file, one a line, or the column of a csv, tsv, parquet."),
]
Out = Annotated[Path, typer.Option("--out", help="Folder for the pictures.")]
Wait = Annotated[bool, typer.Option("--wait", help="Wait until a build has sealed the manifest.")]
Base = Annotated[
    Path | None,
    typer.Option(help="Run, checkpoint or model folder that adapter experts stand on, if it is not --model."),
]
Steps = Annotated[int, typer.Option(min=1, max=1000, help="Steps of the scheduler.")]
Guidance = Annotated[
    list[float] | None,
    typer.Option(
        min=0, help="Weight of the prompt, 9.2 by default; 1 or less draws without. Once, or for each --expert."
    ),
]
Rescale = Annotated[float | None, typer.Option(min=0, max=1, help="0.7 with zero-terminal SNR, 0 without.")]
Scheduler = Annotated[str, typer.Option(help="unipc, dpm++, dpm++-karras, euler, euler-a, heun or ddim.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the first picture; each next one counts up.")]
Negative = Annotated[
    list[str] | None, typer.Option(help="What not to draw, else the null prompt. Once, or for each --expert.")
]
Size = Annotated[int | None, typer.Option(min=64, help="Pixels; the UNet's own size by default.")]
Count = Annotated[int, typer.Option(min=1, help="Pictures of each prompt, or of each given picture.")]
Batch = Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")]
Precision = Annotated[str, typer.Option(help="Of the UNets: fp32, bf16, fp16; auto is bf16 on cuda, else fp32.")]
Offload = Annotated[bool, typer.Option("--offload", help="One UNet on the device at a time.")]
Sheet = Annotated[Path | None, typer.Option(help="A contact sheet too, as one PNG.")]
FromImages = Annotated[
    Path | None,
    typer.Option(help="Begin with a picture, a folder of them, or a store's held-out split; not with noise."),
]
OfManifest = Annotated[str, typer.Option("--manifest", help="With --from-images STORE: the manifest.")]
StartAt = Annotated[
    int | None,
    typer.Option(help="With --from-images: noise to the schedule's first step at or below; below B by default."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="With --from-images: at most so many.")]

BundleOut = Annotated[Path, typer.Option("--out", help="Folder for the bundle; it must be new or empty.")]
BundleForm = Annotated[str, typer.Option("--format", help="diffusers, single-file or kohya-lora.")]
BundleDtype = Annotated[str | None, typer.Option("--dtype", help="fp32, fp16 or bf16; as saved by default.")]
Raw = Annotated[bool, typer.Option("--raw", help="Raw weights, where averaged ones are kept too.")]
Merge = Annotated[
    float | None, typer.Option(help="Both as one model, with this share of the low-noise expert in it, 0 to 1.")
]
MergeAdapters = Annotated[bool, typer.Option("--merge-adapters", help="Add adapters to the UNets that they stand on.")]
MergeStore = Annotated[
    Path | None, typer.Option("--store", help="With --merge: measure on its held-out samples what that costs.")
]
Prove = Annotated[bool, typer.Option(help="Load it back and draw with each stage before it is there.")]
ReportOut = Annotated[Path, typer.Option("--out", help="Folder for report.html, report.json and pictures.")]
ManifestName = Annotated[
    str | None, typer.Option("--manifest", help="Whose held-out samples to use; the experts' own by default.")
]
Draws = Annotated[int, typer.Option(min=1, help="Draws of the eval loss over each part of the schedule.")]
EvalBatch = Annotated[int, typer.Option("--batch", min=1, help="Samples at once on the device.")]
EvalHeldOut = Annotated[
    int, typer.Option("--held-out", min=0, help="Held-out pictures of each data set, finished from below B.")
]
Clip = Annotated[str | None, typer.Option(help="CLIP that scores the prompts' pictures: a folder or a Hub id.")]
EvalGuidance = Annotated[float, typer.Option("--guidance", min=0, help="Weight of the prompt; 1 or less: without.")]
Watch = Annotated[bool, typer.Option("--watch", help="Follow run folders while they train, round after round.")]
MaxShare = Annotated[float, typer.Option(min=0.001, max=1, help="With --watch: at most this share of the time.")]
Tracker = Annotated[
    list[str] | None, typer.Option(help="With --watch: curves in tensorboard, wandb or trackio too, of OUT.")
]
EvalSeed = Annotated[int, typer.Option("--seed", min=0, max=2**62, help="Of every picture.")]


def _train_expert(
    store: StorePath,
    model: Model,
    output: Output,
    config: Configs = None,
    manifest: Name = "main",
    sets: Sets = None,
    device: Device = "auto",
    move_to_manifest: Move = None,
    start: Start = None,
    dry_run: DryRun = False,
    timing: Timing = True,
    json: Json = False,
    wait: Wait = False,
    model_config: ModelConfig = None,
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

    request = Request(settings, store, manifest, model_folder, output, device, move_to_manifest, start)
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
    expert: Experts,
    model: Model,
    out: Out,
    prompt: Prompts = None,
    prompts: PromptFile = None,
    expert_prompt: ExpertPrompts = None,
    steps: Steps = 40,
    guidance: Guidance = None,
    guidance_rescale: Rescale = None,
    scheduler: Scheduler = "unipc",
    seed: Seed = 0,
    count: Count = 1,
    negative_prompt: Negative = None,
    width: Size = None,
    height: Size = None,
    batch: Batch = 1,
    from_images: FromImages = None,
    start_timestep: StartAt = None,
    manifest: OfManifest = "main",
    limit: Limit = None,
    sheet: Sheet = None,
    device: Device = "auto",
    precision: Precision = "auto",
    offload: Offload = False,
    base: Base = None,
    model_config: ModelConfig = None,
) -> None:
    """Draw with a pair of experts: each step is made by the expert whose range its timestep lies in."""
    from shared.model_folder import resolve_model
    from trainer.drawing import GenerateRequest
    from trainer.drawn import needed_components
    from trainer.ensemble import DrawSettings
    from trainer.generate import generate, read_prompts

    asked: list[str | tuple[str, ...]] = [] if expert_prompt is None else [tuple(expert_prompt)]
    if prompts is not None or prompt or not (asked or from_images):
        asked += read_prompts(prompt or [], prompts)
    weights, negatives = tuple(guidance or [9.2]), tuple(negative_prompt or [None])
    request = GenerateRequest(
        experts=expert,
        model=resolve_model(model, needed_components(expert), model_config),
        prompts=asked,
        out=out,
        settings=DrawSettings(steps, weights[0] if len(weights) == 1 else weights, guidance_rescale, scheduler),
        negative_prompt=negatives[0] if len(negatives) == 1 else negatives,
        seed=seed,
        count=count,
        height=height,
        width=width,
        device=device,
        base=base,
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


def _bundle_experts(
    expert: Experts,
    model: Model,
    out: BundleOut,
    form: BundleForm = "diffusers",
    raw: Raw = False,
    merge: Merge = None,
    merge_adapters: MergeAdapters = False,
    dtype: BundleDtype = None,
    base: Base = None,
    prove: Prove = True,
    device: Device = "auto",
    model_config: ModelConfig = None,
    store: MergeStore = None,
    manifest: ManifestName = None,
    draws: Draws = 256,
) -> None:
    """Hand a pair over as what other programs load: diffusers folders, ComfyUI's checkpoints, or LoRA files."""
    from shared.model_folder import resolve_model
    from trainer.bundle import BundleRequest, bundle
    from trainer.drawn import needed_components

    folder = resolve_model(model, needed_components(expert), model_config)
    request = BundleRequest(
        expert, folder, out, form, raw, merge, merge_adapters, dtype, base, prove, device, store, manifest, draws
    )
    typer.echo(str(bundle(request)))


def _evaluate_experts(
    expert: Experts,
    store: StorePath,
    model: Model,
    out: ReportOut,
    manifest: ManifestName = None,
    draws: Draws = 256,
    batch: EvalBatch = 4,
    prompt: Prompts = None,
    prompts: PromptFile = None,
    clip: Clip = None,
    held_out: EvalHeldOut = 4,
    steps: Steps = 40,
    guidance: EvalGuidance = 9.2,
    guidance_rescale: Rescale = None,
    scheduler: Scheduler = "unipc",
    seed: EvalSeed = 0,
    watch: Watch = False,
    max_share: MaxShare = 0.2,
    tracker: Tracker = None,
    precision: Precision = "auto",
    device: Device = "auto",
    base: Base = None,
    model_config: ModelConfig = None,
) -> None:
    """Judge experts beside their start model: losses by timestep, pictures, every way to pair them, in one report."""
    from shared.model_folder import COMPONENTS, resolve_clip, resolve_model
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
        base=base,
        pictures=wish,
    )
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
