"""The table of schedulers: what diffusers' own classes can do, and what is said where they cannot."""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from shared.contract import PairContract
from shared.errors import ConfigError
from trainer.schedulers import SCHEDULERS, Support, make_scheduler, scheduler_warnings, support_of, support_table

ROOT = Path(__file__).parents[2]


def contract_of(prediction_type: str, is_zero: bool, spacing: str = "trailing") -> PairContract:
    return PairContract.model_validate(
        {
            "num_timesteps": 1000,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "zero_terminal_snr": is_zero,
            "prediction_type": prediction_type,
            "timestep_spacing": spacing,
            "scaling_factor": 0.13025,
            "vae_digest": "v",
            "text_digests": {},
        }
    )


def plain(name: str, contract: PairContract) -> Any:
    """diffusers' scheduler without our table."""
    class_name, extra = SCHEDULERS[name]
    kept = contract.model_dump(include={"beta_schedule", "beta_start", "beta_end", "prediction_type"})
    rescaled = {"rescale_betas_zero_snr": True} if contract.zero_terminal_snr else {}
    return getattr(diffusers, class_name)(**kept, timestep_spacing=contract.timestep_spacing, **rescaled, **extra)


@pytest.mark.parametrize(("name", "kind", "is_zero", "support"), support_table())
def test_what_is_refused_cannot_be_drawn_and_the_rest_can(
    name: str, kind: Any, is_zero: bool, support: Support
) -> None:
    contract = contract_of(kind, is_zero)
    if support.verdict == "refused":
        with pytest.raises(ConfigError, match=f"--scheduler {name.replace('+', '.')}: .*; these experts need"):
            make_scheduler(name, contract)
        return
    scheduler = make_scheduler(name, contract)
    scheduler.set_timesteps(5)
    x = torch.ones(1, 4, 8, 8) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(torch.zeros_like(x), t, x, return_dict=False)[0]
    assert torch.isfinite(x).all()
    assert bool(scheduler_warnings(name, contract)) == (support.verdict == "warned")


def test_what_is_refused_is_so_in_diffusers() -> None:
    """Once it is not, the table may let it in."""
    assert "rescale_betas_zero_snr" not in inspect.signature(diffusers.HeunDiscreteScheduler.__init__).parameters
    scheduler = plain("euler-a", contract_of("sample", False))
    scheduler.set_timesteps(2)
    with pytest.raises(NotImplementedError):
        scheduler.step(torch.ones(1, 4, 8, 8), scheduler.timesteps[0], torch.ones(1, 4, 8, 8))


def test_what_is_warned_of_is_so() -> None:
    scheduler = make_scheduler("dpm++-karras", contract_of("v_prediction", True))
    for steps in (10, 30, 100):
        scheduler.set_timesteps(steps)
        assert (scheduler.timesteps >= 350).float().mean() >= 0.8
        assert (scheduler.timesteps > 990).float().mean() >= 0.4
    assert support_of("dpm++-karras", "v_prediction", False).verdict == "supported"
    lines = scheduler_warnings("unipc", contract_of("v_prediction", True, "leading"))
    assert lines == ["the experts' spacing 'leading' never comes to t = 999, where there is nothing but noise"]


def test_an_unknown_scheduler_is_named() -> None:
    with pytest.raises(ConfigError, match="--scheduler plms: known are unipc"):
        make_scheduler("plms", contract_of("epsilon", False))


def test_the_guide_shows_the_table() -> None:
    text = (ROOT / "docs" / "drawing.md").read_text(encoding="utf-8")
    for name in SCHEDULERS:
        cells = [s.verdict for row, _, _, s in support_table() if row == name]
        assert f"| `{name}` | {' | '.join(cells)} |" in text
    for support in {row[3] for row in support_table()}:
        assert support.why in " ".join(text.split())
