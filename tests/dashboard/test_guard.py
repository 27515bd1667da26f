"""T27: nothing that a request can say leads out of what the page shows, and every answer ties the browser down."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient

from dashboard.access import choose_access
from dashboard.guard import HEADERS
from shared.errors import ConfigError

Ask = Callable[..., TestClient]
SECRET = "the token of this test 0123456789"

FOREIGN = [
    "evil.example", "evil.example:8765", "127.0.0.1.evil.example", "localhost.evil.example", "127.0.0.2", "0.0.0.0",
    "[::2]", "[::1]evil.example", "localhost@evil.example", "127.0.0.1:8765@evil.example", "evil.example#127.0.0.1",
    "", " ", "LOCALHOST.", "127.1", "2130706433",
]  # fmt: skip
UP = ["../", "..%2f", "%2e%2e/", "%2e%2e%2f", "..%5c", "....//", "..;/", "%252e%252e%252f"]
BEFORE = ["/", "/static/", "/picture/", "/picture/evaluation/", "/api/", "/static/%00", "//", "/static/./"]


def secret_file(tmp_path: Path) -> Path:
    (tmp_path / "secret.txt").write_text(SECRET)
    return tmp_path / "secret.txt"


def test_64_ways_out_lead_nowhere(world: Any, ask: Ask, tmp_path: Path) -> None:
    secret = secret_file(tmp_path)
    client = ask(world.store, under=world.runs, sources=(world.pictures,))
    tried = 0
    for before in BEFORE:
        for up in UP:
            answer = client.get(before + up * 12 + quote(str(secret).lstrip("/")))
            assert answer.status_code in (400, 404), answer.url
            assert SECRET not in answer.text
            assert str(tmp_path) not in answer.text
            tried += 1
    assert tried == 64
    for name in ("manifest", "bucket", "split", "page"):
        answer = client.get("/api/gallery", params={name: f"../../..{secret}"})
        assert SECRET not in answer.text


def test_foreign_hosts_are_refused(world: Any, ask: Ask) -> None:
    client = ask(world.store)
    assert len(FOREIGN) == 16
    for host in FOREIGN:
        for address in ("/", "/api/status", "/healthz", "/metrics"):
            answer = client.get(address, headers={"host": host})
            assert answer.status_code == 421, (host, address)
            assert "pictures" not in answer.text
    for host in ("127.0.0.1", "127.0.0.1:1", "localhost:8765", "[::1]:8765", "LocalHost"):
        assert client.get("/healthz", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND"])
def test_only_reading(method: str, world: Any, ask: Ask) -> None:
    assert ask(world.store).request(method, "/api/status").status_code == 405


def test_every_answer_is_tied_down(world: Any, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages, data, what is not there, what is refused, and what went wrong inside."""
    client = ask(world.store)
    answers = [client.get(address) for address in ("/", "/api/status", "/static/page.js", "/nothing", "/static/x")]
    answers += [client.get("/", headers={"host": "evil.example"}), client.post("/"), client.head("/")]

    def fail(*_: object) -> None:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr("dashboard.app.metrics_text", fail)
    answers.append(client.get("/metrics"))
    assert answers[-1].status_code == 500
    assert "secret" not in answers[-1].text
    assert "Traceback" not in answers[-1].text
    for answer in answers:
        for name, value in HEADERS.items():
            assert answer.headers[name] == value, answer.url
    assert "unsafe" not in HEADERS["content-security-policy"]
    page = answers[0].text
    assert "<style" not in page
    assert "style=" not in page
    assert "onclick" not in page
    assert page.count("<script") == page.count('src="/static/uPlot') + page.count('src="/static/page')


def test_an_address_that_others_reach_needs_a_token(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org"):
        with pytest.raises(ConfigError, match="--token-file"):
            choose_access(host, None, [])
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        assert choose_access(host, None, []).token is None
    (tmp_path / "short").write_text("short\n")
    for file in ("short", "absent"):
        with pytest.raises(ConfigError, match="--token-file"):
            choose_access("0.0.0.0", tmp_path / file, [])


def test_the_token_opens_the_page_once_and_the_cookie_from_then_on(world: Any, ask: Ask, tmp_path: Path) -> None:
    access = choose_access("0.0.0.0", secret_file(tmp_path), ["my-machine.example"])
    client = ask(world.store, access=access)
    for address in ("/", "/api/status", "/metrics", "/readyz", "/static/page.js", "/?token=wrong"):
        assert client.get(address).status_code == 401, address
    assert client.get("/healthz").status_code == 200
    assert client.get("/api/status", headers={"authorization": f"Bearer {SECRET}"}).status_code == 200
    assert client.get("/api/status", headers={"authorization": f"Basic {SECRET}"}).status_code == 401
    answer = client.get("http://127.0.0.1:8765//evil.example/", params={"token": SECRET, "page": "2"})
    assert answer.status_code == 303
    assert answer.headers["location"] == "/evil.example/?page=2"
    cookie = answer.headers["set-cookie"]
    assert SECRET not in cookie
    assert "HttpOnly" in cookie
    assert "samesite=lax" in cookie.lower()
    assert client.get("/api/status", headers={"host": "my-machine.example:8765"}).status_code == 200
    assert client.get("/api/status").status_code == 200
    client.cookies.clear()
    client.cookies.set("sdxl_experts_page", "f" * 32)
    assert client.get("/api/status").status_code == 401
