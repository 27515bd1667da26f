"""Door of this tower: parse, load, serve, one line on an error. Nothing heavy is imported for --help."""

from pathlib import Path
from typing import Annotated

import typer

from shared.command import run_command

StorePath = Annotated[Path, typer.Option("--store", help="Store to show; it may come to be later.")]
Runs = Annotated[list[Path] | None, typer.Option("--run", help="Run folder of an expert, or an evaluation's folder.")]
RunsUnder = Annotated[Path | None, typer.Option(help="Folder whose runs and evaluations are shown as they come.")]
Sources = Annotated[list[Path] | None, typer.Option("--source", help="Folder that pictures were built from.")]
Host = Annotated[str, typer.Option(help="Address to serve on; any but the machine's own needs --token-file.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")]
TokenFile = Annotated[Path | None, typer.Option(help="File with the token that readers must show.")]
Allowed = Annotated[list[str] | None, typer.Option("--allowed-host", help="Further name the page is reached by.")]


def _cache_dashboard(
    store: StorePath,
    run: Runs = None,
    runs_under: RunsUnder = None,
    source: Sources = None,
    host: Host = "127.0.0.1",
    port: Port = 8765,
    token_file: TokenFile = None,
    allowed_host: Allowed = None,
) -> None:
    """Show a store, its build and the experts that train from it as a web page; it only reads."""
    from dashboard.access import choose_access

    access = choose_access(host, token_file, allowed_host or [])  # refused in a blink
    from dashboard.app import make_app
    from dashboard.server import serve
    from dashboard.watched import Watched

    watched = Watched(store.absolute(), tuple(run or ()), runs_under, tuple(source or ()))
    serve(make_app(watched, access), watched, host, port)


def cache_dashboard() -> None:
    """Console script `cache-dashboard`."""
    run_command(_cache_dashboard)
