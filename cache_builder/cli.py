"""Doors of this tower: parse, load, call one function, one line on an error. Nothing heavy is imported for --help."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from shared.command import run_command, yield_idle_threads

Folder = Annotated[Path, typer.Argument(help="Folder of pictures, each with its caption beside it (cat.png, cat.txt).")]
StorePath = Annotated[Path, typer.Option("--store", help="Store to add to; made where there is none.")]
Model = Annotated[str, typer.Option("--model", help="SDXL-layout model: a diffusers folder or a Hub id.")]
Name = Annotated[str, typer.Option("--manifest", help="Name of the manifest to seal.")]
Resolution = Annotated[int | None, typer.Option(help="Short for --set images.resolution=N, pixels.")]
Configs = Annotated[list[Path] | None, typer.Option("--config", help="TOML file; several are layered, later ones win.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="One setting, e.g. captions.lines=first.")]
Device = Annotated[str, typer.Option(help="auto, cuda, mps or cpu.")]
Dataset = Annotated[str | None, typer.Option(help="Id of the data set; the folder's name by default.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Wait = Annotated[bool, typer.Option("--wait", help="Wait for another build of this store instead of failing.")]
Replace = Annotated[bool, typer.Option("--replace", help="Let the manifest's name go over to other data sets.")]
Shrink = Annotated[bool, typer.Option("--allow-shrink", help="Let the manifest lose more than a tenth of its samples.")]


def _cache_build(
    folder: Folder,
    store: StorePath,
    model: Model,
    manifest: Name = "main",
    resolution: Resolution = None,
    config: Configs = None,
    sets: Sets = None,
    device: Device = "auto",
    dataset: Dataset = None,
    as_json: Json = False,
    wait: Wait = False,
    replace: Replace = False,
    allow_shrink: Shrink = False,
) -> None:
    """Encode a folder of captioned pictures into a store, once; what is stored already is reused."""
    from cache_builder.build import BuildOptions, build
    from cache_builder.config import BuildConfig
    from cache_builder.sources.folder import FolderSource
    from shared.config import load_config
    from shared.model_folder import resolve_model

    short = [] if resolution is None else [f"images.resolution={resolution}"]
    settings = load_config(BuildConfig, config or [], [*short, *(sets or [])])
    dataset_id = dataset or _printable_name(folder)
    source = FolderSource(folder, dataset_id, settings.captions, settings.images.max_bytes)
    source.scan()  # a missing folder is said before a model is looked for
    model_folder = resolve_model(model, ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    options = BuildOptions(store, manifest, device, wait, replace, allow_shrink)
    report = build([source], model_folder, settings, options)
    typer.echo(json.dumps(report.as_json(), indent=1) if as_json else report.as_text())


def _printable_name(folder: Path) -> str:
    """A folder's name as a data set's id, which is text."""
    return os.fsencode(folder.resolve().name).decode("utf-8", "backslashreplace") or "root"


def cache_build() -> None:
    """Console script `cache-build`."""
    yield_idle_threads()
    run_command(_cache_build)


def cache_store() -> None:
    """Console script `cache-store`."""
    from cache_builder.store_cli import COMMANDS

    yield_idle_threads()
    run_command(COMMANDS, about="Look after a store: verify, stats, diff, gc, show, copy.")


if __name__ == "__main__":
    cache_build()
