"""Doors of this tower: parse, load, call one function, one line on an error. Nothing heavy is imported for --help."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared.command import not_yet, run_command, yield_idle_threads

if TYPE_CHECKING:
    from trainer.run import Request

Configs = Annotated[list[Path] | None, typer.Option("--config", help="TOML file; several are layered, later ones win.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="One setting, e.g. optimizer.learning_rate=1e-6.")]
StorePath = Annotated[Path, typer.Option("--store", help="Store that cache-build made.")]
Name = Annotated[str, typer.Option("--manifest", help="Manifest to begin on; a run that goes on keeps its own.")]
Model = Annotated[str, typer.Option("--model", help="SDXL-layout model: a diffusers folder or a Hub id.")]
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
PromptFile = Annotated[Path | None, typer.Option("--prompts", help="Text file with a prompt on each line.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the pictures.")]
Base = Annotated[
    Path | None, typer.Option(help="Run folder or checkpoint that adapter experts stand on, if it is not --model.")
]
Steps = Annotated[int, typer.Option(min=1, max=1000, help="Steps of the scheduler.")]
Guidance = Annotated[float, typer.Option(min=0, help="Weight of the prompt; 1 or less draws without guidance.")]
Rescale = Annotated[float | None, typer.Option(min=0, max=1, help="0.7 with zero-terminal SNR, 0 without.")]
Scheduler = Annotated[str, typer.Option(help="unipc, dpm++, dpm++-karras, euler, euler-a, heun or ddim.")]
Seed = Annotated[int, typer.Option(help="Seed of the first picture; each next one counts up.")]
Negative = Annotated[str | None, typer.Option(help="What not to draw; the null prompt where it is not given.")]
Size = Annotated[int | None, typer.Option(min=64, help="Pixels; the UNet's own size by default.")]
Count = Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")]

BundleOut = Annotated[Path, typer.Option("--out", help="Folder for the bundle; it must be new or empty.")]
BundleForm = Annotated[str, typer.Option("--format", help="diffusers, single-file or kohya-lora.")]
BundleDtype = Annotated[str | None, typer.Option("--dtype", help="fp32, fp16 or bf16; as saved by default.")]
Raw = Annotated[bool, typer.Option("--raw", help="Raw weights, where averaged ones are kept too.")]
Merge = Annotated[bool, typer.Option("--merge", help="Add adapters to the UNets that they stand on.")]
Prove = Annotated[bool, typer.Option(help="Load it back and draw with each stage before it is there.")]


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
) -> None:
    """Train one expert from a store; run it twice at once, with base.toml and with refiner.toml."""
    from shared.config import load_config
    from shared.model_folder import resolve_model
    from trainer.config import ExpertConfig

    settings = load_config(ExpertConfig, config or [], sets or [])
    model_folder = resolve_model(model, ("unet",))
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
    steps: Steps = 40,
    guidance: Guidance = 9.2,
    guidance_rescale: Rescale = None,
    scheduler: Scheduler = "unipc",
    seed: Seed = 0,
    count: Count = 1,
    negative_prompt: Negative = None,
    width: Size = None,
    height: Size = None,
    device: Device = "auto",
    base: Base = None,
) -> None:
    """Draw with a pair of experts: each step is made by the expert whose range its timestep lies in."""
    from shared.model_folder import resolve_model
    from trainer.drawn import needed_components
    from trainer.ensemble import DrawSettings
    from trainer.generate import GenerateRequest, generate, read_prompts

    request = GenerateRequest(
        experts=expert,
        model=resolve_model(model, needed_components(expert)),
        prompts=read_prompts(prompt or [], prompts),
        out=out,
        settings=DrawSettings(steps, guidance, guidance_rescale, scheduler),
        negative_prompt=negative_prompt,
        seed=seed,
        count=count,
        height=height,
        width=width,
        device=device,
        base=base,
    )
    for path in generate(request):
        typer.echo(str(path))


def _bundle_experts(
    expert: Experts,
    model: Model,
    out: BundleOut,
    form: BundleForm = "diffusers",
    raw: Raw = False,
    merge: Merge = False,
    dtype: BundleDtype = None,
    base: Base = None,
    prove: Prove = True,
    device: Device = "auto",
) -> None:
    """Hand a pair over as what other programs load: diffusers folders, ComfyUI's checkpoints, or LoRA files."""
    from shared.model_folder import resolve_model
    from trainer.bundle import BundleRequest, bundle
    from trainer.drawn import needed_components

    folder = resolve_model(model, needed_components(expert))
    request = BundleRequest(expert, folder, out, form, raw, merge, dtype, base, prove, device)
    typer.echo(str(bundle(request)))


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
    not_yet("evaluate-experts", "RUN/events.jsonl and TensorBoard show the losses, generate-images the pictures")


def bundle_experts() -> None:
    """Console script `bundle-experts`."""
    yield_idle_threads()
    run_command(_bundle_experts)
