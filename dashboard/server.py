"""The process of the page: one socket, one thread that serves, low priority; the door to uvicorn."""

import asyncio
import errno
import os
import signal
import socket

import uvicorn
from starlette.types import ASGIApp

from dashboard.service import announce, withdraw
from dashboard.watched import Watched
from shared.errors import ConfigError
from shared.progress import say

NICENESS = 5  # builders and trainers go first; a page among many of them still answers
MOST_CONNECTIONS = 256
GRACE_S = 2


def serve(app: ASGIApp, watched: Watched, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT; raises ConfigError where the address cannot be had."""
    listening = _listen(host, port)
    port = listening.getsockname()[1]
    os.nice(NICENESS)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="on",
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=GRACE_S,
    )
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises what ended it once more, when all is closed
        signal.signal(number, lambda *_: None)
    card = announce(watched.store.path, host, port)
    say(f"the page of {watched.store.path}: http://{_shown(host)}:{port}/")
    try:
        asyncio.run(uvicorn.Server(config).serve(sockets=[listening]))
    finally:
        listening.close()
        if card is not None:
            withdraw(card)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} on {host} is taken: name another, --port N, or --port 0 for any") from None
        raise ConfigError(f"--host {host} --port {port}: {error.strerror or error}") from None


def _shown(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return "localhost"
    return f"[{host}]" if ":" in host else host
