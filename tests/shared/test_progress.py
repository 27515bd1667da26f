"""What is said while work goes on: lines for people now and then, and every step for whoever listens."""

import pytest

from shared import progress as module
from shared.progress import progress, told


def test_whoever_listens_is_told_of_every_step_and_nobody_else() -> None:
    heard: list[tuple[str, int, int | None]] = []
    with told(lambda *news: heard.append(news)), progress("crops", 5, "crops", done=1) as advance:
        advance(3)
        advance(1)
    with progress("crops", 5, "crops") as advance:
        advance(5)
    assert heard == [("crops", 1, 5), ("crops", 4, 5), ("crops", 5, 5)]


def test_lines_say_how_much_is_left_where_that_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "LINE_EVERY_S", 0)
    with progress("crops", 4, "crops") as advance:
        advance(1)
    with progress("scan", None, "pictures") as advance:
        advance(64)
    known, unknown = capsys.readouterr().err.splitlines()
    assert known.startswith("crops: 1 of 4, ")
    assert known.endswith(" s left")
    assert unknown.startswith("scan: 64, ")
    assert "left" not in unknown
