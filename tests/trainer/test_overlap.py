"""An overlap reaches beyond the range as far as it says, in training alone; off, nothing of it is there."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.config import dump_config, load_config
from shared.contract import OverlapFacts, check_partition
from shared.errors import ConfigError
from shared.schedule import NoiseSchedule, TimestepRange, sample_timesteps, scaled_linear_betas
from shared.seeding import make_generator
from trainer.checkpoint import open_expert
from trainer.config import ExpertConfig, LossConfig
from trainer.loop import train_expert
from trainer.loss import DenoisingLoss
from trainer.overlap import Overlap, drawn_range, widest_range
from trainer.rehearsal import rehearse

CPU = torch.device("cpu")
BASE, MIDDLE, REFINER = TimestepRange(350, 1000), TimestepRange(200, 350), TimestepRange(0, 200)
JITTER = Overlap(width=50, jitter=True)
STEPS = 4000


def objective(within: TimestepRange, overlap: Any = 0, seed: int = 1) -> DenoisingLoss:
    settings = LossConfig.model_validate({"overlap": overlap})
    schedule = NoiseSchedule(scaled_linear_betas(1000, 0.00085, 0.012))
    return DenoisingLoss(schedule, within, "epsilon", 0.5, settings, seed)


@pytest.mark.parametrize(
    ("within", "low", "high"), [(BASE, 300, 1000), (MIDDLE, 150, 400), (REFINER, 0, 250), (TimestepRange(0, 20), 0, 70)]
)
def test_a_band_has_its_share_of_every_step(within: TimestepRange, low: int, high: int) -> None:
    loss = objective(within, 50)
    assert loss.trained == TimestepRange(low, high)
    t = loss.timesteps(3, high - low, CPU)
    assert sorted(t.tolist()) == list(range(low, high))  # strata as wide as a timestep: each comes once
    few = loss.timesteps(4, 16, CPU)
    expected = sum(x not in within for x in range(low, high)) * 16 / (high - low)
    assert abs(sum(x not in within for x in few.tolist()) - expected) <= 2  # to within one at either edge


def test_jitter_moves_the_edges_from_step_to_step_alike_at_every_width() -> None:
    ranges = [drawn_range(JITTER, MIDDLE, 1000, 1, step) for step in range(STEPS)]
    assert ranges == [drawn_range(JITTER, MIDDLE, 1000, 1, step) for step in range(STEPS)]
    assert ranges != [drawn_range(JITTER, MIDDLE, 1000, 2, step) for step in range(STEPS)]
    for widths in ([MIDDLE.low - own.low for own in ranges], [own.high - MIDDLE.high for own in ranges]):
        counts = Counter(widths)
        assert sorted(counts) == list(range(51))  # never inside the range: what it answers for is always trained
        chi2 = sum((count - STEPS / 51) ** 2 / (STEPS / 51) for count in counts.values())
        assert chi2 < 87  # 50 degrees of freedom: one seed of a thousand is above
    assert any(MIDDLE.low - own.low != own.high - MIDDLE.high for own in ranges)
    assert widest_range(JITTER, MIDDLE, 1000) == TimestepRange(150, 400)


def test_the_edges_of_the_schedule_do_not_move() -> None:
    assert {drawn_range(JITTER, BASE, 1000, 0, step).high for step in range(200)} == {1000}
    assert {drawn_range(JITTER, REFINER, 1000, 0, step).low for step in range(200)} == {0}


def test_off_draws_what_the_range_alone_does() -> None:
    for overlap in (0, {"width": 0, "jitter": True}):
        loss = objective(BASE, overlap)
        assert loss.trained == BASE
        for step in range(5):
            plain = sample_timesteps(BASE, 8, make_generator(1, "t", step))
            assert torch.equal(loss.timesteps(step, 8, CPU), plain)


def test_a_number_is_a_width_and_is_written_as_it_was() -> None:
    for written, meant in ((50, Overlap(width=50)), ({"width": 50, "jitter": True}, JITTER)):
        config = LossConfig.model_validate({"overlap": written})
        assert config.overlap == meant
        assert LossConfig.model_validate(config.model_dump(mode="json")) == config
        assert config.model_dump(mode="json")["overlap"] == written
    assert "overlap = 0" in dump_config(LossConfig())


@pytest.mark.parametrize(
    ("overlap", "why"),
    [
        ("loss.overlap=-1", "loss.overlap.width: input should be greater than or equal to 0"),
        ("loss.overlap=true", "loss.overlap: input should be a valid dictionary or instance of Overlap"),
        ("loss.overlap={width=50, jitters=true}", "'loss.overlap.jitters'; did you mean 'loss.overlap.jitter'?"),
        ("loss={overlap=50, timestep_bias={strategy='later'}}", "loss.overlap and loss.timestep_bias exclude each"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(overlap: str, why: str) -> None:
    sets = ["name=x", "steps=1", "timesteps={low=0, high=350}", overlap]
    with pytest.raises(ConfigError) as error:
        load_config(ExpertConfig, [], sets)
    assert why in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def overlapping(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of a refiner whose edge moves, unbroken."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("overlap") / "run"
    train_expert(world.request(run, *SETS, "steps=4", expert="refiner"))
    return run


SETS = (
    "batch=8",
    "checkpoint.every=2",
    "loss.overlap={width=200, jitter=true}",
    "loss.caption_dropout={low=0.3, high=0}",
    "eval.samples=4",
    "eval.share=1",
)


def test_a_run_goes_on_bit_for_bit(world: Any, overlapping: Path, files_of: Callable[..., Any], tmp_path: Path) -> None:
    for steps in ("steps=3", "steps=4"):
        train_expert(world.request(tmp_path / "broken", *SETS, steps, expert="refiner"))
    assert files_of(tmp_path / "broken", 4) == files_of(overlapping, 4)


def test_it_is_trained_beyond_its_range_and_answers_for_its_range_alone(
    world: Any, overlapping: Path, events: Callable[..., Any]
) -> None:
    seen = [part for event in events(overlapping, "step") for part in event["bins"]]
    assert 350 < max(high for _, high, _, _ in seen) <= 550
    scored = [part for event in events(overlapping, "eval") for part in event["bins"]]
    assert max(high for _, high, _, _ in scored) == 350
    facts = open_expert(overlapping).card.facts
    assert facts.overlap == OverlapFacts(width=200, jitter=True)
    check_partition([facts.timesteps, BASE], 1000)


def test_what_it_is_trained_on_is_said(world: Any, overlapping: Path, events: Callable[..., Any]) -> None:
    readme = next((overlapping / "checkpoints").glob("step-*04/README.md")).read_text()
    assert "timesteps beyond its own: trained up to 200 at each edge where a partner goes on" in readme
    assert any("spends up to 36.4% of a step's samples" in event["why"] for event in events(overlapping, "advice"))
    told = rehearse(world.request(overlapping.with_name("new"), "loss.overlap=100"), with_timing=False)
    assert told.lines()[0].startswith("base: timesteps [350, 1000), trained on [250, 1000), begins")
    assert any("loss.overlap = 100 spends 13.3% of a step's" in note for note in told.notes)
    alone = rehearse(world.request(overlapping.with_name("new"), "loss.overlap=100", expert="whole"), with_timing=False)
    assert any("loss.overlap = 100 changes nothing: [0, 1000) has no edge" in note for note in alone.notes)
    assert alone.timesteps == "[0, 1000)"


def test_a_run_from_before_overlaps_goes_on(world: Any, files_of: Callable[..., Any], tmp_path: Path) -> None:
    """Configs and cards that know nothing of it mean that there is none."""
    run = tmp_path / "run"
    train_expert(world.request(run, "steps=2"))
    config = (run / "config.toml").read_text()
    assert "overlap = 0\n" in config
    (run / "config.toml").write_text(config.replace("overlap = 0\n", ""))
    card = json.loads((run / "expert.json").read_text())
    del card["facts"]["overlap"]
    (run / "expert.json").write_text(json.dumps(card))
    assert train_expert(world.request(run, "steps=3")) == 3
