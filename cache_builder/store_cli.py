"""`cache-store`: what is in a store, is it sound, what differs, what may go, how does it look; a copy, out and in.

Each subcommand loads what it needs and calls one function; the result is a report for people or, with --json, for
programs (cache_builder/store_text.py). Nothing heavy is imported for --help.
"""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

UNSOUND = 65  # exit code where something is wrong with the store

StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="The store.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Name = Annotated[str, typer.Option("--manifest", help="Name of the manifest.")]
Quick = Annotated[bool, typer.Option("--quick", help="Only that what manifests name is there; the default.")]
Deep = Annotated[bool, typer.Option("--deep", help="Also read every record: checksum, key, header, finite numbers.")]
Quarantine = Annotated[
    bool,
    typer.Option("--quarantine", help="Move bad records to STORE/quarantine/; the next build encodes them anew. Deep."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")]
Drop = Annotated[
    list[str] | None, typer.Option("--drop", metavar="DIGEST", help="First drop this manifest; may be given again.")
]
EvenCurrent = Annotated[bool, typer.Option("--even-current", help="Let --drop take the current manifest of a name.")]
Target = Annotated[Path, typer.Option("--to", metavar="NEW", help="Folder that becomes the copy; must not exist.")]
Url = Annotated[str, typer.Option("--to", metavar="URL", help="A folder, or s3://BUCKET/PREFIX.")]
Source = Annotated[str, typer.Argument(metavar="URL", help="Where an export is: a folder, or s3://BUCKET/PREFIX.")]
Into = Annotated[Path, typer.Option("--store", help="Store to import into; made where there is none.")]
OnlyName = Annotated[
    str | None, typer.Option("--manifest", help="Only this manifest, the current one, and what it needs; else all.")
]
PartOf = Annotated[
    str | None,
    typer.Option("--partition", metavar="I/N", help="Only the records of part I (from 0) of N of the samples."),
]
Replace = Annotated[bool, typer.Option("--replace", help="Let a manifest's name go over to other data sets.")]
Wait = Annotated[bool, typer.Option("--wait", help="Wait for a build of this store instead of failing.")]
Pictures = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of captioned pictures, as it was built from.")]
DatasetId = Annotated[str | None, typer.Option("--dataset", help="Which data set of the manifest FOLDER is.")]
Model = Annotated[str | None, typer.Option("--model", help="Decode with this model's VAE; else by the stored preview.")]
Out = Annotated[Path, typer.Option("--out", help="PNG file to write.")]
SourceFolder = Annotated[
    list[Path] | None, typer.Option("--source", help="Folder of a data set, to show pictures beside their crops.")
]
Count = Annotated[int, typer.Option("--count", min=1, max=400, help="How many samples, spread over the manifest.")]
Device = Annotated[str, typer.Option(help="auto, cuda, mps or cpu.")]


def verify(
    store: StorePath, quick: Quick = False, deep: Deep = False, quarantine: Quarantine = False, as_json: Json = False
) -> int:
    """Is the store sound? Ends with 65 where something is wrong."""
    from cache_builder.store_text import verdict_text
    from cache_builder.verify import verify_store
    from shared.errors import ConfigError

    if quick and (deep or quarantine):
        raise ConfigError("--quick reads no records: leave it out with --deep or --quarantine")
    verdict = verify_store(store, deep=deep or quarantine, quarantine=quarantine)
    _print(verdict.as_json(), verdict_text(verdict), as_json)
    return UNSOUND if verdict.faults else 0


def stats(store: StorePath, as_json: Json = False) -> None:
    """Records by kind, captions, buckets, manifests, and what no manifest names."""
    from cache_builder.stats import store_stats
    from cache_builder.store_text import stats_text

    found = store_stats(store)
    _print(found.as_json(), stats_text(found), as_json)


def diff(
    store: StorePath,
    folder: Pictures,
    manifest: Name = "main",
    dataset: DatasetId = None,
    as_json: Json = False,
) -> None:
    """What a build of FOLDER would change: new, changed and gone pictures and captions, by their bytes."""
    from cache_builder.diff import diff_folder
    from cache_builder.store_text import difference_text

    found = diff_folder(store, folder, manifest, dataset)
    _print(found.as_json(), difference_text(found), as_json)


def gc(
    store: StorePath,
    dry_run: DryRun = False,
    drop: Drop = None,
    even_current: EvenCurrent = False,
    as_json: Json = False,
) -> None:
    """Delete the records that no manifest names: left by edited pictures, and by builds that never completed."""
    from cache_builder.gc import collect_garbage
    from cache_builder.store_text import garbage_text

    report = collect_garbage(store, dry_run=dry_run, drop=drop or [], even_current=even_current)
    _print(report.as_json(), garbage_text(report), as_json)


def show(
    store: StorePath,
    out: Out,
    manifest: Name = "main",
    model: Model = None,
    source: SourceFolder = None,
    count: Count = 24,
    device: Device = "auto",
    as_json: Json = False,
) -> int:
    """Draw a contact sheet: what the latents hold, beside the pictures they were made from. 65 if a record is bad."""
    from cache_builder.show import ShowOptions, show_store
    from cache_builder.store_text import shown_text

    shown = show_store(store, out, ShowOptions(manifest, model, tuple(source or ()), count, device))
    _print(shown.as_json(), shown_text(shown), as_json)
    return UNSOUND if shown.damaged else 0


def copy(store: StorePath, to: Target, as_json: Json = False) -> None:
    """Copy a store, compact and verified, while others go on using it."""
    from cache_builder.store_copy import copy_store
    from cache_builder.store_text import copy_text

    report = copy_store(store, to)
    _print(report.as_json(), copy_text(report), as_json)


def export(store: StorePath, to: Url, manifest: OnlyName = None, as_json: Json = False) -> None:
    """Write a store as Parquet shards, to be imported elsewhere; the same command goes on where it was stopped."""
    from cache_builder.store_text import export_text
    from cache_builder.transfer.store_export import export_store

    _stop_as_by_ctrl_c()
    report = export_store(store, to, manifest=manifest)
    _print(report.as_json(), export_text(report), as_json)


def import_(
    source: Source,
    store: Into,
    partition: PartOf = None,
    manifest: OnlyName = None,
    replace: Replace = False,
    wait: Wait = False,
    as_json: Json = False,
) -> None:
    """Bring an export into a store, all of it or a part; the same command goes on where it was stopped."""
    from cache_builder.store_text import import_text
    from cache_builder.transfer.store_import import import_store
    from shared.parts import parse_part

    _stop_as_by_ctrl_c()
    part = parse_part(partition) if partition else None
    report = import_store(source, store, part=part, manifest=manifest, replace=replace, wait=wait)
    _print(report.as_json(), import_text(report), as_json)


COMMANDS: dict[str, Callable[..., Any]] = {
    "verify": verify,
    "stats": stats,
    "diff": diff,
    "gc": gc,
    "show": show,
    "copy": copy,
    "export": export,
    "import": import_,
}


def _stop_as_by_ctrl_c() -> None:
    """A supervisor's stop is Ctrl-C: one line, and 75."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _print(report: dict[str, Any], text: str, as_json: bool) -> None:
    typer.echo(json.dumps(report, indent=1) if as_json else text)
