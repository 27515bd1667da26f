"""Doors of this tower: parse, load, call one function, one line on an error. Nothing heavy is imported for --help."""

import json
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from shared.command import run_command, yield_idle_threads

Folder = Annotated[
    str | None,
    typer.Argument(help="Folder of pictures with captions (cat.png, cat.txt), a table, or .tar shards; or s3://..."),
]
StorePath = Annotated[Path, typer.Option("--store", help="Store to add to; made where there is none.")]
Model = Annotated[
    str, typer.Option("--model", help="SDXL-layout model: a diffusers folder, a Hub id, or one .safetensors file.")
]
ModelConfig = Annotated[
    str | None,
    typer.Option(help="With --model FILE: folder or Hub id of its tokenizers and settings, if not beside it."),
]
Name = Annotated[str, typer.Option("--manifest", help="Name of the manifest to seal.")]
Resolution = Annotated[int | None, typer.Option(help="Short for --set images.resolution=N, pixels.")]
Configs = Annotated[list[Path] | None, typer.Option("--config", help="TOML file; several are layered, later ones win.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="One setting, e.g. captions.lines=first.")]
Device = Annotated[str, typer.Option(help="auto, cuda, mps or cpu; or several: cuda:0,cuda:1.")]
Dataset = Annotated[str | None, typer.Option(help="Id of FOLDER's data set; its name by default.")]
Prompts = Annotated[Path | None, typer.Option(help="Text file with a prompt on each line, embedded for validation.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Wait = Annotated[bool, typer.Option("--wait", help="Wait for another build of this store instead of failing.")]
Replace = Annotated[bool, typer.Option("--replace", help="Let the manifest's name go over to other data sets.")]
Shrink = Annotated[bool, typer.Option("--allow-shrink", help="Let the manifest lose more than a tenth of its samples.")]

Rehash = Annotated[bool, typer.Option("--rehash", help="Read every file, also those that have not changed.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Write nothing; say what a build would do and if it would work.")
]
NoTiming = Annotated[bool, typer.Option("--no-timing", help="With --dry-run: load no weights, time nothing.")]
Decode = Annotated[bool, typer.Option("--decode", help="With --dry-run: decode every picture, to find damaged ones.")]
Runner = Annotated[str, typer.Option(help="Where to encode: local, or ray (the workers of a Ray cluster).")]
RayAddress = Annotated[
    str | None,
    typer.Option(help="With --runner ray: HOST:PORT of a running cluster, or auto; else one is started here."),
]
Output = Annotated[str, typer.Option(help="What --runner ray writes: the store, or shards (Parquet, at --to).")]
To = Annotated[
    str | None, typer.Option("--to", help="With --output shards: a folder or s3://..., for cache-store import.")
]


def _cache_build(
    store: StorePath,
    model: Model,
    folder: Folder = None,
    manifest: Name = "main",
    resolution: Resolution = None,
    config: Configs = None,
    sets: Sets = None,
    device: Device = "auto",
    dataset: Dataset = None,
    prompts: Prompts = None,
    as_json: Json = False,
    wait: Wait = False,
    replace: Replace = False,
    allow_shrink: Shrink = False,
    rehash: Rehash = False,
    dry_run: DryRun = False,
    no_timing: NoTiming = False,
    decode: Decode = False,
    model_config: ModelConfig = None,
    runner: Runner = "local",
    ray_address: RayAddress = None,
    output: Output = "store",
    to: To = None,
) -> None:
    """Encode captioned pictures, FOLDER or the data sets of --config, into a store, once; reuse what is stored."""
    from cache_builder.build import BuildOptions, build
    from cache_builder.config import BuildConfig
    from cache_builder.datasets import choose_datasets, open_sources
    from cache_builder.sources.trees import is_bucket
    from shared.config import load_config
    from shared.errors import ConfigError
    from shared.model_folder import resolve_model
    from shared.prompts import read_prompts_file

    if (no_timing or decode) and not dry_run:
        raise ConfigError("--no-timing and --decode are for --dry-run")
    where = _where_to_encode(runner, ray_address, output, to, is_rehearsed=dry_run)
    short = [] if resolution is None else [f"images.resolution={resolution}"]
    settings = load_config(BuildConfig, config or [], [*short, *(sets or [])])
    texts = tuple(dict.fromkeys(read_prompts_file(prompts))) if prompts else ()
    root = Path(folder) if folder is not None and not is_bucket(folder) else folder
    settings = choose_datasets(settings, root, dataset)
    sources = open_sources(settings.datasets)
    needed = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    model_folder = resolve_model(model, needed, model_config)
    options = BuildOptions(store, manifest, device, wait, replace, allow_shrink, texts, rehash, **where)
    if dry_run:
        from cache_builder import dry_run as rehearsed

        how = rehearsed.DryRunOptions(timing=not no_timing, decode=decode)
        foreseen = rehearsed.dry_run(sources, model_folder, settings, options, how)
        typer.echo(json.dumps(foreseen.as_json(), indent=1) if as_json else foreseen.as_text())
        for refusal in foreseen.refusals:
            raise refusal
        return
    report = build(sources, model_folder, settings, options)
    typer.echo(json.dumps(report.as_json(), indent=1) if as_json else report.as_text())


def _where_to_encode(
    runner: str, ray_address: str | None, output: str, to: str | None, *, is_rehearsed: bool
) -> dict[str, Any]:
    """What BuildOptions says of where records are made and where they go; raises ConfigError where that cannot be."""
    from shared.errors import ConfigError

    if runner not in ("local", "ray"):
        raise ConfigError(f"--runner {runner}: it is local or ray")
    if ray_address is not None and runner != "ray":
        raise ConfigError("--ray-address is for --runner ray")
    if output not in ("store", "shards"):
        raise ConfigError(f"--output {output}: it is store or shards")
    if output == "shards" and to is None:
        raise ConfigError("--output shards needs --to FOLDER or --to s3://BUCKET/PREFIX")
    if output == "store" and to is not None:
        raise ConfigError(f"--to {to} is for --output shards")
    if to is not None and runner != "ray":
        raise ConfigError(
            "--output shards is for --runner ray; on one machine build the store, and cache-store export STORE --to URL"
        )
    if is_rehearsed and runner == "ray":
        raise ConfigError("--dry-run tries and times the encoder of this machine: leave --runner ray out")
    return {"runner": runner, "ray_address": ray_address, "shards_to": to}


def cache_build() -> None:
    """Console script `cache-build`."""
    yield_idle_threads()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a supervisor's stop is Ctrl-C: one line, and 75
    run_command(_cache_build)


ServeConfigs = Annotated[list[Path], typer.Option("--config", help="TOML file (configs/serve.toml); later ones win.")]
FirstReplace = Annotated[bool, typer.Option("--replace", help="As for cache-build; for the first build alone.")]
FirstShrink = Annotated[bool, typer.Option("--allow-shrink", help="As for cache-build; for the first build alone.")]


def _cache_serve(
    config: ServeConfigs, sets: Sets = None, replace: FirstReplace = False, allow_shrink: FirstShrink = False
) -> None:
    """Keep a store up to date as pictures arrive in the folders of --config, with a page that shows it."""
    from cache_builder.serve_config import ServeConfig
    from shared.config import load_config
    from shared.errors import ConfigError

    settings = load_config(ServeConfig, config, sets or [])
    try:
        from cache_builder.serve import ServeOptions, serve
    except ModuleNotFoundError as error:
        if error.name != "watchfiles":
            raise
        raise ConfigError("cache-serve watches by watchfiles: pip install 'sdxl-experts[serve]'") from None
    serve(settings, ServeOptions(replace, allow_shrink))


def cache_serve() -> None:
    """Console script `cache-serve`."""
    yield_idle_threads()
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # until the service answers it, as while it fetches a model
    run_command(_cache_serve)


def cache_store() -> None:
    """Console script `cache-store`."""
    from cache_builder.store_cli import COMMANDS

    yield_idle_threads()
    run_command(COMMANDS, about="Look after a store: verify, stats, diff, gc, show, copy, export, import.")


if __name__ == "__main__":
    cache_build()
