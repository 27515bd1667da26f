"""What every request passes first and every answer gets last: host, method, token; headers that tie a browser down.

request -> Guard -> app.py; errors inside come back without a traceback
"""

from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dashboard.access import COOKIE, Access

OPEN_PATHS = frozenset({"/healthz"})  # says that a process lives, and nothing else
METHODS = ("GET", "HEAD")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
COOKIE_AGE_S = 30 * 86400


class Guard:
    """The app behind its door."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; what is not HTTP is passed on."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        answer = self._refusal(request) or self._welcome(request)
        await (answer or self._app)(scope, receive, _with_headers(send))

    def _refusal(self, request: Request) -> Response | None:
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or not self._access.allows_host(hosts[0]):
            way_out = "the page is not served under this name; cache-dashboard --allowed-host NAME adds one"
            return PlainTextResponse(f"{way_out}\n", 421)
        if request.method not in METHODS:
            return PlainTextResponse("this page only shows: GET and HEAD\n", 405, {"allow": ", ".join(METHODS)})
        return None

    def _welcome(self, request: Request) -> Response | None:
        """What is said in place of an answer: the cookie to whoever shows the token, 401 to whoever shows nothing."""
        if self._access.token is None or request.url.path in OPEN_PATHS:
            return None
        shown = request.query_params.get("token")
        if shown is not None:
            return self._take(request) if self._access.is_token(shown) else _no_token()
        kind, _, bearer = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self._access.is_token(bearer.strip()):
            return None
        return None if self._access.is_cookie(_cookie(request)) else _no_token()

    def _take(self, request: Request) -> Response:
        """Once a token was in the address, it goes into a cookie and out of the address."""
        left = [(key, value) for key, value in parse_qsl(request.url.query) if key != "token"]
        path = "/" + request.url.path.lstrip("/")  # never "//elsewhere"
        answer = RedirectResponse(path + (f"?{urlencode(left)}" if left else ""), 303)
        cookie, secure = self._access.cookie(), request.url.scheme == "https"
        answer.set_cookie(COOKIE, cookie, COOKIE_AGE_S, path="/", secure=secure, httponly=True, samesite="lax")
        return answer


def _no_token() -> Response:
    way_out = "this page asks for its token: open it once as /?token=TOKEN, or send Authorization: Bearer TOKEN"
    return PlainTextResponse(f"{way_out}\n", 401, {"www-authenticate": "Bearer"})


def _cookie(request: Request) -> str:
    try:
        kept = SimpleCookie(request.headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return kept.value if kept else ""


def _with_headers(send: Send) -> Send:
    async def headed(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
            headers.setdefault("cache-control", "no-cache")
        await send(message)

    return headed
