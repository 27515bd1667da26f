"""`make demo` from nothing to its report: what the pair draws is not below what it began with, and finer."""

import json
from pathlib import Path

import pytest

from demo.main_job import PROMPTS, main


@pytest.mark.slow
def test_the_pair_is_not_below_its_start_model_and_finer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert main(tmp_path / "out") == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    pair, start = scores["pair"]["all"], scores["start"]["all"]
    assert pair["pictures"] == start["pictures"] == 3 * PROMPTS
    assert pair["follows"] >= start["follows"] - 1.5 / pair["pictures"]  # one picture is chance
    assert pair["sharpness"] > start["sharpness"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img ") == 2 * pair["pictures"]
    before = (tmp_path / "out" / "runs" / "base" / "checkpoints" / "latest.json").stat().st_mtime_ns
    assert main(tmp_path / "out") == 0  # goes on with what is there
    assert (tmp_path / "out" / "runs" / "base" / "checkpoints" / "latest.json").stat().st_mtime_ns == before
