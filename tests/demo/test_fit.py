"""The small training loop: what it learns, and that a run that was cut short goes on as if it had not been."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from demo.fit import fit
from demo.fit_plan import FitPlan
from shared.errors import CheckpointError
from shared.seeding import make_generator

PLANS = [
    FitPlan(steps=40, learning_rate=3e-2, batch=8, warmup=5, save_every=10),
    FitPlan(steps=40, learning_rate=3e-2, batch=8, warmup=5, save_every=10, muon_rate=0.02),
]


class Cut(Exception):
    """Stands for a kill."""


def layers() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))


def task(model: nn.Module, cut_at: int | None = None):  # type: ignore[no-untyped-def]
    def loss(step: int) -> Tensor:
        if step == cut_at:
            raise Cut
        x = torch.randn(8, 16, generator=make_generator(0, "x", step))
        error: Tensor = (model(x) - x.flip(1)).square().mean()
        return error

    return loss


@pytest.mark.parametrize("plan", PLANS, ids=["adamw", "muon"])
@pytest.mark.parametrize("cut_at", [3, 25])
def test_it_learns_and_goes_on_bit_for_bit(plan: FitPlan, cut_at: int, tmp_path: Path) -> None:
    model = layers()
    whole = fit("net", model, task(model), plan, tmp_path / "whole")
    broken = layers()
    with pytest.raises(Cut):
        fit("net", broken, task(broken, cut_at), plan, tmp_path / "broken")
    again = layers()
    resumed = fit("net", again, task(again), plan, tmp_path / "broken")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    done = layers()
    finished = fit("net", done, task(done, cut_at=0), plan, tmp_path / "whole")  # nothing is left to do
    assert all(torch.equal(whole[name], finished[name]) for name in whole)


def test_losses_are_logged_and_fall(tmp_path: Path) -> None:
    model = layers()
    plan = FitPlan(steps=150, learning_rate=1e-2, batch=8, warmup=5)
    fit("net", model, task(model), plan, tmp_path)
    events = [json.loads(line) for line in (tmp_path / "net.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == [50, 100, 150]
    assert events[2]["loss"] < 0.5 * events[0]["loss"]


def test_another_models_state_is_refused(tmp_path: Path) -> None:
    model = layers()
    fit("net", model, task(model), PLANS[0], tmp_path)
    other = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16))
    with pytest.raises(CheckpointError, match="of another model"):
        fit("net", other, task(other), PLANS[0], tmp_path)


def test_rates_warm_up_and_run_down() -> None:
    plan = FitPlan(steps=1000, learning_rate=1.0, batch=1, warmup=100)
    shares = [plan.share(step) for step in range(1000)]
    assert shares[0] == pytest.approx(0.01)
    assert shares[:100] == sorted(shares[:100])
    assert shares[100:] == sorted(shares[100:], reverse=True)
    assert 0.97 < max(shares) < 1
    assert shares[-1] < 0.011
