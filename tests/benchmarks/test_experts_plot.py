"""The pictures of the evidence: intervals where there are seeds, and every arm and boundary on them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.experts_plot import arm_names, plot_losses, plot_pictures
from benchmarks.experts_table import bin_gains

CUTS = ((0, 350), (350, 1000))
GAINS = {"one": 0.0, "pair 350": -0.1, "halves 350": 0.2}


def results_of(seeds: int, spread: float = 0.01) -> dict[str, Any]:
    """Losses that each arm changes by its share of GAINS, more with each seed by `spread`."""
    runs: dict[str, Any] = {}
    for name, gain in GAINS.items():
        for seed in range(seeds):
            loss = 0.2 * (1 + gain + spread * seed * (name != "one"))
            bins = [[[at, at + 50, loss, 9] for at in range(*cut, 50)] for cut in CUTS]
            losses = {f"{low}-{high}": {"loss": loss, "bins": own} for (low, high), own in zip(CUTS, bins, strict=True)}
            runs[f"{name}-{seed}"] = {"losses": losses}
    arms = [
        {"name": name, "kind": "full", "seed": seed, "runs": [f"{name}-{seed}"], "pictures": pictures(name)}
        for name in GAINS
        for seed in range(seeds)
    ]
    return {"runs": runs, "arms": arms}


def pictures(name: str) -> Sequence[dict[str, Any]]:
    return [
        {"prompt": f"{which} {i}", "set": which, "follows": i % 3 == 0 or name == "pair 350", "sharpness": 0.7}
        for which in ("one", "held out", "two")
        for i in range(12)
    ]


def test_each_stretch_has_its_gain_and_its_interval() -> None:
    found = bin_gains(results_of(3), "full", "pair 350")
    assert [(low, high) for low, high, _ in found] == [(at, at + 50) for at in range(0, 1000, 50)]
    for *_, gain in found:
        assert gain.mean == pytest.approx(-0.09)
        assert gain.low is not None
        assert gain.low < -0.09 < gain.high  # type: ignore[operator]
    assert all(gain.low is None for *_, gain in bin_gains(results_of(1), "full", "pair 350"))


def test_pictures_show_every_arm_and_are_the_same_each_time(tmp_path: Path) -> None:
    results = results_of(3)
    assert arm_names(results, "full") == ["pair 350", "halves 350"]
    for draw in (plot_losses, plot_pictures):
        drawn = draw(results, "full", tmp_path / "a.svg").read_text()
        assert {"pair 350", "halves 350"} <= set(re.findall(r">([^<>]+)</text>", drawn))
        assert draw(results, "full", tmp_path / "a.svg").read_text() == drawn
    # A band for each arm in the one panel, and none where one seed says nothing of chance.
    assert plot_losses(results, "full", tmp_path / "a.svg").read_text().count("FillBetweenPolyCollection") == 2
    assert "FillBetweenPolyCollection" not in plot_losses(results_of(1), "full", tmp_path / "a.svg").read_text()
