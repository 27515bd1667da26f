"""What each address answers; the door to Starlette, with guard.py around it.

/                                   the page            /healthz /readyz /metrics   for machines
/api/status /api/runs /api/events   what it shows       /static/NAME                its script, style and plots
/api/gallery                        a page of samples   /picture/...                pictures, by ids
"""

import json
import re
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Any

import anyio
from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from dashboard.access import Access
from dashboard.guard import Guard
from dashboard.metrics import CONTENT_TYPE, metrics_text
from dashboard.watched import Kept, Watched, etag_of
from shared.errors import ExpertsError

STATIC = {
    "page.js": "text/javascript",
    "parts.js": "text/javascript",
    "plots.js": "text/javascript",
    "words.js": "text/javascript",
    "page.css": "text/css",
    "icon.svg": "image/svg+xml",
    "uPlot.iife.min.js": "text/javascript",
    "uPlot.min.css": "text/css",
}
DECODING_AT_ONCE = 2
FOREVER = "private, max-age=86400, immutable"
DIGEST, SAMPLE, EVALUATION = (re.compile(f"[0-9a-f]{{{length}}}") for length in (64, 32, 16))
NUMBER = re.compile("[0-9]{1,6}")
BUCKET = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")


def make_app(watched: Watched, access: Access) -> ASGIApp:
    """The page and its answers, behind its guard."""
    answers = _Answers(watched)
    routes = [
        Route("/", answers.page),
        Route("/healthz", answers.healthz),
        Route("/readyz", answers.readyz),
        Route("/metrics", answers.metrics),
        Route("/api/status", partial(answers.kept, watched.status)),
        Route("/api/runs", partial(answers.kept, watched.runs)),
        Route("/api/events", partial(answers.kept, watched.events)),
        Route("/api/gallery", answers.gallery),
        Route("/static/{name}", answers.static),
        Route("/picture/{digest}/{sample}/preview.png", answers.preview),
        Route("/picture/{digest}/{sample}/source.jpg", answers.source),
        Route("/picture/evaluation/{evaluation}/{round}/{number}.jpg", answers.evaluation),
    ]

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        threading.Thread(target=watched.read_all, name="first look", daemon=True).start()
        yield
        watched.store.close()

    handlers: Any = {ExpertsError: _explain, OSError: _explain}
    return Guard(Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers), access)


class _Answers:
    """Answers to requests; what takes time is done in threads."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        folder = files("dashboard") / "static"
        self._files = {name: (folder / name).read_bytes() for name in (*STATIC, "index.html")}
        self._decoding = anyio.CapacityLimiter(DECODING_AT_ONCE)

    async def page(self, request: Request) -> Response:
        return _tagged(request, self._files["index.html"], "text/html; charset=utf-8")

    async def static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in STATIC:
            return _nothing()
        return _tagged(request, self._files[name], STATIC[name])

    async def healthz(self, request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(self, request: Request) -> Response:
        status = await run_sync(self._watched.status)
        why = status["store"]["why"]
        return PlainTextResponse(f"{why}\n" if why else "ok\n", 503 if why else 200)

    async def metrics(self, request: Request) -> Response:
        return Response(await run_sync(metrics_text, self._watched), media_type=CONTENT_TYPE)

    async def kept(self, answer: Kept, request: Request) -> Response:
        fresh = answer.fresh()
        return _json(request, await run_sync(answer) if fresh is None else fresh)

    async def gallery(self, request: Request) -> Response:
        asked = request.query_params
        bucket = BUCKET.fullmatch(asked.get("bucket", ""))
        page = asked.get("page", "0")
        made = await run_sync(
            self._watched.gallery.page,
            asked.get("manifest") or None,
            (int(bucket[1]), int(bucket[2])) if bucket else None,
            asked.get("split") or None,
            int(page) if NUMBER.fullmatch(page) else 0,
        )
        return _json(request, made)

    async def preview(self, request: Request) -> Response:
        return await self._of_sample(request, self._watched.gallery.preview, "image/png")

    async def source(self, request: Request) -> Response:
        return await self._of_sample(request, self._watched.gallery.source, "image/jpeg")

    async def evaluation(self, request: Request) -> Response:
        evaluation, *numbers = (request.path_params[name] for name in ("evaluation", "round", "number"))
        if not EVALUATION.fullmatch(evaluation) or not all(NUMBER.fullmatch(each) for each in numbers):
            return _nothing()
        make = partial(self._watched.evaluation_picture, evaluation, *map(int, numbers))
        made = await run_sync(make, limiter=self._decoding, abandon_on_cancel=True)
        return _tagged(request, made, "image/jpeg")

    async def _of_sample(self, request: Request, make: Callable[[str, bytes], bytes], kind: str) -> Response:
        digest, sample = request.path_params["digest"], request.path_params["sample"]
        if not DIGEST.fullmatch(digest) or not SAMPLE.fullmatch(sample):
            return _nothing()
        made = await run_sync(make, digest, bytes.fromhex(sample), limiter=self._decoding, abandon_on_cancel=True)
        return _tagged(request, made, kind, FOREVER)


def _json(request: Request, made: dict[str, Any]) -> Response:
    body = json.dumps(made, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _tagged(request, body.encode(errors="backslashreplace"), "application/json")


def _tagged(request: Request, body: bytes, kind: str, keep: str = "no-cache") -> Response:
    """`body`, or 304 where the browser has just that."""
    tag = etag_of(body)
    headers = {"etag": tag, "cache-control": keep}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type=kind, headers=headers)


def _nothing() -> Response:
    return PlainTextResponse("nothing here\n", 404)


async def _explain(request: Request, error: Exception) -> Response:
    """One line for what cannot be shown: no traceback, no path of an OSError."""
    said = str(error) if isinstance(error, ExpertsError) else "the disk does not answer as it should"
    return PlainTextResponse(f"{said}\n", 404 if request.url.path.startswith("/picture/") else 503)
