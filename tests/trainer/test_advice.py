"""What is said of settings that are idle or harmful in the expert's own range."""

from pathlib import Path
from typing import Any

import pytest

from shared.config import load_config
from trainer.advice import objective_advice
from trainer.config import ExpertConfig
from trainer.loop import train_expert
from trainer.start import start_advice

RANGES = {"base": "{low=350, high=1000}", "refiner": "{low=0, high=350}", "whole": "{low=0, high=1000}"}
V_ZERO = (
    "schedule.prediction_type=v_prediction",
    "schedule.zero_terminal_snr=true",
    "schedule.timestep_spacing=trailing",
)


def advice(expert: str, *sets: str) -> list[str]:
    config = load_config(ExpertConfig, [], [f"name={expert}", f"timesteps={RANGES[expert]}", "steps=1000", *sets])
    return objective_advice(config)


@pytest.mark.parametrize("expert", RANGES)
def test_of_the_shipped_objectives_nothing_is_said(expert: str) -> None:
    assert advice(expert) == []
    assert advice(expert, *V_ZERO) == []


@pytest.mark.parametrize(
    ("expert", "sets", "says"),
    [
        ("base", ["loss.min_snr_gamma=5"], "changes nothing: over [350, 1000) the SNR is at most 1.03"),
        ("base", [*V_ZERO, "loss.min_snr_gamma=5"], "by 0.13 on average over [350, 1000), by 0.48 at t = 350 and 0 at"),
        ("refiner", [*V_ZERO, "loss.min_snr_gamma=5"], "by 0.55 on average over [0, 350)"),
        ("base", ["schedule.prediction_type=sample", "loss.min_snr_gamma=5"], "clips nothing, the SNR is at most 1.03"),
        ("refiner", ["loss.offset_noise=0.1"], "teaches nothing to an expert of [0, 350): brightness stands by SNR 1"),
        ("base", [*V_ZERO, "loss.offset_noise=0.1"], "a second cure of the same fault"),
        ("base", ["loss.input_perturbation=0.1"], "shows 0.5% more noise than t says, 0.07 to 0.1 of a"),
        ("refiner", ["loss.input_perturbation=0.1"], "0.0029 to 0.07 of a latent's deviation"),
        ("base", ["loss.type=huber"], "bends at errors of 0.33 to 0.1"),
        ("base", ["loss.type=huber", "loss.huber_c=20", "loss.huber_schedule=constant"], "changes nothing"),
        ("base", ["loss.timestep_bias={strategy='later', multiplier=1}"], "changes nothing: every timestep"),
        ("base", ["loss.timestep_bias={strategy='earlier', portion=1.0}"], "changes nothing: every timestep"),
        (
            "base",
            ["loss.timestep_bias={strategy='range', low=500, high=1000, multiplier=0}"],
            "500 of 650 timesteps of [350, 1000) are never drawn, the first t = 500, the last t = 999",
        ),
        ("whole", ["loss.timestep_bias={strategy='logit-normal', std=0.4}"], "rarer than once in 1000 steps"),
        ("whole", ["schedule.timestep_spacing=trailing"], "training shows SNR 0.0047"),
        ("base", ["loss.caption_dropout=0"], "never trains the null prompt"),
    ],
)  # fmt: skip
def test_what_is_idle_or_harmful_is_named(expert: str, sets: list[str], says: str) -> None:
    lines = advice(expert, *sets)
    assert any(says in line for line in lines), lines
    assert all("\n" not in line for line in lines)


@pytest.mark.parametrize(
    ("expert", "sets"),
    [
        ("refiner", ["loss.min_snr_gamma=5"]),  # bites below t = 147
        ("base", ["loss.min_snr_gamma=0.5"]),
        ("base", ["loss.offset_noise=0.05"]),
        ("base", ["loss.timestep_bias={strategy='later'}"]),
        ("refiner", ["schedule.timestep_spacing=trailing"]),
    ],
)
def test_what_works_in_the_range_is_left_alone(expert: str, sets: list[str]) -> None:
    assert advice(expert, *sets) == []


def test_a_run_begins_with_its_notes(world: Any, events: Any, tmp_path: Any, capfd: pytest.CaptureFixture[str]) -> None:
    train_expert(world.request(tmp_path / "run", "steps=1", "loss.min_snr_gamma=5"))
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(said) == 2
    assert said[1].endswith("predicts epsilon: the UNet first has to unlearn that, which takes thousands of steps")
    assert "loss.min_snr_gamma = 5 weighs the error of v_prediction by 0.13 on average" in said[0]
    assert [f"note: {event['why']}" for event in events(tmp_path / "run", "advice")] == said


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["schedule.prediction_type=epsilon", "schedule.zero_terminal_snr=false"], ""),
        ([], "thousands of steps"),
        (["schedule.prediction_type=sample", "adapter.rank=2"], "an adapter on it has all of that to undo"),
    ],
)
def test_a_start_model_that_predicts_something_else_is_named(world: Any, sets: list[str], said: str) -> None:
    request = world.request(Path("run"), *sets)
    lines = start_advice(request.config, request.model, None)
    assert len(lines) == bool(said)
    assert all(said in line and "predicts epsilon" in line for line in lines)
    # An expert's weights are what its contract says, which is compared with this run's.
    assert start_advice(request.config, request.model, Path("other")) == []
