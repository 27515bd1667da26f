"""What is measured of a start is there: help comes without torch's import, the first step soon after it."""

import json
from pathlib import Path

import pytest

from benchmarks import start_time


@pytest.mark.slow
def test_the_figures_of_a_start(tmp_path: Path) -> None:
    assert start_time.main(["--rounds", "1", "--json", str(tmp_path / "out.json")]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    for name in start_time.COMMANDS:
        assert results["python alone"]["processor_s"] < results[name]["processor_s"] < 0.3
    assert results["first step"]["processor_s"] < 1.5 * results["bare import"]["processor_s"]
