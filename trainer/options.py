"""What the options of this tower's commands are called, and what `--help` says of them (cli.py)."""

from pathlib import Path
from typing import Annotated

import typer

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
Partner = Annotated[
    Path | None,
    typer.Option(help="With loss.exposure: run folder or checkpoint of the expert that hands over to this one."),
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
Out = Annotated[Path, typer.Option("--out", file_okay=False, help="Folder for the pictures.")]
Wait = Annotated[bool, typer.Option("--wait", help="Wait until a build has sealed the manifest.")]
Base = Annotated[
    Path | None,
    typer.Option(help="Run, checkpoint, model folder or .safetensors that adapters stand on, if it is not --model."),
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
ReportOut = Annotated[
    Path, typer.Option("--out", file_okay=False, help="Folder for report.html, report.json and pictures.")
]
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
