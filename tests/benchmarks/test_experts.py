"""Two experts against one: that arms cost the same, that intervals hold what is true, and the whole of it in small."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks import experts_vs_one
from benchmarks.experts_arms import VARIATIONS, arms, variations
from benchmarks.experts_handover import DRIFTS, drifts
from benchmarks.experts_judge import stretches
from benchmarks.experts_table import handover_gains, loss_gains, over_prompts, over_seeds, picture_gains, tables

LOSSES = {"0-350": 0.2, "350-1000": 0.4}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_arm_has_the_same_steps_and_the_whole_schedule(kind: str) -> None:
    found = list(arms(700, (200, 350, 500), seed=1, kind=kind))
    assert [arm.name for arm in found] == ["one", "pair 200", "halves 200", "pair 350", "halves 350", "pair 500"]
    for arm in found:
        assert sum(run.steps for run in arm.runs) == 700
        assert [arm.runs[0].low, *(run.high for run in arm.runs)] == [0, *(run.low for run in arm.runs[1:]), 1000]
        assert {(run.seed, run.kind) for run in arm.runs} == {(1, kind)}
    low, high = found[3].runs
    assert (low.steps, high.steps) == (245, 455)


def test_variations_change_what_they_say_alone() -> None:
    plain = {run.name for arm in arms(700, (350,), seed=0) for run in arm.runs}
    found = list(variations(700, 350, seed=0))
    assert len(found) == len(VARIATIONS)
    for arm in found:
        changed = [run for run in arm.runs if run.sets]
        assert changed
        assert all(run.name in plain for run in arm.runs if not run.sets)
        exposed = [run for run in arm.runs if any(one.startswith("loss.exposure") for one in run.sets)]
        assert [run.partner for run in arm.runs if run.partner] == [arm.runs[-1].name for _ in exposed]
    assert len({run.name for arm in found for run in arm.runs}) > len(plain) - 2
    assert [*variations(700, 350, 0, ["exposure 0.1"])] == [arm for arm in found if "exposure" in arm.name]


def test_a_partner_is_trained_before_who_asks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever order runs are asked for; a run that asks nobody waits for nobody."""
    finished: list[str] = []

    class Begun:
        def __init__(self, command: list[str], environment: object) -> None:
            self.name = Path(command[command.index("--output") + 1]).name
            self.partner = Path(command[command.index("--partner") + 1]) if "--partner" in command else None
            assert self.partner is None or self.partner.name in finished

        def wait(self) -> int:
            finished.append(self.name)
            return 0

    monkeypatch.setattr(experts_vs_one, "start", Begun)
    monkeypatch.setattr(experts_vs_one, "steps_of", lambda run: 0)
    runs = [run for arm in reversed(list(variations(700, 350, seed=0))) for run in arm.runs]
    runs = list(dict.fromkeys(runs))
    assert runs[0].partner
    options = experts_vs_one._options([str(tmp_path), "--at-once", "3"])
    experts_vs_one._train(tmp_path, runs, options)
    assert sorted(finished) == sorted(run.name for run in runs)


def test_stretches_are_cut_at_every_boundary() -> None:
    assert [(cut.low, cut.high) for cut in stretches((500, 200))] == [(0, 200), (200, 500), (500, 1000)]


def results_of(seeds: int, gain: float, noise: float) -> dict[str, Any]:
    """A pair whose loss differs by the share `gain` from the one's, and which follows every second prompt more."""
    draw = random.Random(3)
    arms_, runs = [], {}
    for seed in range(seeds):
        for name, share in (("one", 0.0), ("pair 350", gain)):
            run = f"{name}-s{seed}"
            change = 1 + share + draw.gauss(0, noise)
            runs[run] = {"losses": {key: {"loss": loss * change} for key, loss in LOSSES.items()}}
            pictures = [
                {
                    "prompt": f"{i}",
                    "set": "two",
                    "follows": name != "one" and i % 2 == 0,
                    "sharpness": 0.7,
                    "corner_error_px": None,
                }
                for i in range(40)
            ]
            arms_.append({"name": name, "kind": "full", "seed": seed, "runs": [run], "pictures": pictures})
    return {"start": {"losses": {key: {} for key in LOSSES}}, "runs": runs, "arms": arms_}


def test_a_gain_is_clear_where_it_is_larger_than_chance() -> None:
    clear = loss_gains(results_of(3, -0.05, 0.002), "full", "pair 350", lambda low, high: True)
    assert clear.is_clear
    assert clear.low is not None
    assert clear.low < -0.05 < clear.high  # type: ignore[operator]
    vague = loss_gains(results_of(3, -0.001, 0.05), "full", "pair 350", lambda low, high: True)
    assert not vague.is_clear
    assert not over_seeds([0.1]).is_clear  # one training says nothing of chance
    assert over_seeds([0.1]).mean == 0.1


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    draw, held = random.Random(0), 0
    for _ in range(200):
        found = over_seeds([draw.gauss(1.0, 0.5) for _ in range(3)])
        held += found.low <= 1.0 <= found.high  # type: ignore[operator]
    assert 0.90 <= held / 200 <= 0.99


def test_pictures_are_compared_prompt_by_prompt() -> None:
    results = results_of(2, 0.0, 0.01)
    gain = picture_gains(results, "full", "pair 350", "two", "follows")
    assert gain is not None
    assert gain.mean == 0.5
    assert gain.is_clear
    assert picture_gains(results, "full", "pair 350", "one", "follows") is None
    assert picture_gains(results, "full", "pair 350", "", "corner_error_px") is None
    assert not over_prompts([0.0, 0.0, 0.0]).is_clear
    text = tables(results)
    assert "| pair 350 | – | – | **+50.00 % (" in text
    assert "| loss against the one | [0, 350) | [350, 1000) | all |" in text


def handed(mean: float, variance: float, power: float) -> dict[str, Any]:
    """Drawn latents that differ from real ones as said."""
    real = {"mean": [0.5, -1.0], "variance": [4.0, 1.0], "power": [3.0, 0.5, None]}
    drawn = {
        "mean": [0.5 + 2 * mean, -1.0 - mean],
        "variance": [4.0 * math.exp(variance), math.exp(-variance)],
        "power": [3.0 * math.exp(power), 0.5 * math.exp(power), None],
    }
    return {"timestep": 366.0, "pictures": 64, "drawn": drawn, "real": real}


def test_what_is_handed_over_drifts_by_what_it_differs_from_data_in() -> None:
    assert drifts(handed(0, 0, 0)) == dict.fromkeys(DRIFTS, 0.0)
    assert drifts(handed(0.3, 0.2, -0.1)) == pytest.approx({"mean": 0.3, "variance": 0.2, "power": 0.1})


def test_hand_overs_are_compared_at_the_same_boundary() -> None:
    results = results_of(2, 0.0, 0.01)
    assert handover_gains(results, "full", "pair 350", "mean") == []
    assert "drift" not in tables(results)
    for arm in results["arms"]:
        own = 0.2 + 0.01 * arm["seed"] if arm["name"] == "pair 350" else 0.15
        arm["handover"] = {"350": handed(own, 0, 0)}
        if arm["name"] == "one":
            arm["handover"]["500"] = handed(9, 9, 9)
    own, one, change = handover_gains(results, "full", "pair 350", "mean")
    assert (own.mean, one.mean, change.mean) == pytest.approx((0.205, 0.15, 0.055))
    assert "| drift at the hand-over / of the one | mean | variance | power |" in tables(results)
    assert "| pair 350 | 20.5 / 15.0 %, +5.50 % (" in tables(results)


@pytest.mark.slow
def test_the_whole_of_it_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    small = ["--steps", "6", "--seeds", "2", "--pictures", "160", "--prompts", "1", "--draws", "4", "--batch", "4"]
    small += ["--handover", "2"]
    assert experts_vs_one.main([str(tmp_path), *small]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert {arm["name"] for arm in results["arms"]} == {"one", "pair 350", "halves 350"}
    for arm in results["arms"]:
        losses = {key for name in arm["runs"] for key in results["runs"][name]["losses"]}
        assert losses == set(results["start"]["losses"]) == {"0-200", "200-350", "350-500", "500-1000"}
        assert len(arm["pictures"]) == 3
        assert all(drifts(arm["handover"]["350"])[what] > 0 for what in DRIFTS)
    assert "pair 350" in tables(results)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/checkpoints/latest.json")}
    assert experts_vs_one.main([str(tmp_path), *small]) == 0  # nothing is made twice
    assert before == {path: path.stat().st_mtime_ns for path in before}
