"""diffusers' schedulers under a pair's contract: which there are, what each can serve, and how one is begun midway.

The table: every scheduler x prediction type x zero-terminal SNR is supported, warned of or refused (`support_of`);
docs/drawing.md shows it. Settings come from the contract alone, never from a model's folder.
"""

import inspect
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from shared.contract import PairContract
from shared.errors import ConfigError
from shared.schedule import PredictionType

Verdict = Literal["supported", "warned", "refused"]

# Schedulers by the name that people use: diffusers' class, and settings beyond what the contract says.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "unipc": ("UniPCMultistepScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
}


@dataclass(frozen=True)
class Support:
    """Whether a scheduler can draw with experts of a kind, and what there is to say."""

    verdict: Verdict
    why: str = ""


def support_of(name: str, prediction_type: PredictionType, zero_terminal_snr: bool) -> Support:
    """What becomes of a scheduler with experts that predict so, on such a schedule."""
    if zero_terminal_snr and prediction_type == "epsilon":
        return Support("refused", "at zero SNR a predicted eps says nothing of the picture")
    if zero_terminal_snr and name == "heun":
        return Support("refused", "ignores zero-terminal SNR")
    if name == "euler-a" and prediction_type == "sample":
        return Support("refused", "cannot draw with a predicted x_0 ('sample')")
    if zero_terminal_snr and name == "dpm++-karras":
        return Support("warned", "takes five of six steps above t = 350, and four of ten above t = 990")
    return Support("supported")


def support_table() -> list[tuple[str, PredictionType, bool, Support]]:
    """Every row: scheduler, prediction type, zero-terminal SNR, and what becomes of it."""
    kinds = [(kind, is_zero) for is_zero in (False, True) for kind in get_args(PredictionType)]
    return [(name, kind, is_zero, support_of(name, kind, is_zero)) for name in SCHEDULERS for kind, is_zero in kinds]


def make_scheduler(name: str, contract: PairContract) -> Any:
    """diffusers' scheduler of that name for this contract; raises ConfigError where it cannot serve it."""
    if name not in SCHEDULERS:
        raise ConfigError(f"--scheduler {name}: known are {', '.join(SCHEDULERS)}")
    support = support_of(name, contract.prediction_type, contract.zero_terminal_snr)
    if support.verdict == "refused":
        raise ConfigError(f"--scheduler {name}: {support.why}; these experts need another one")
    import diffusers

    class_name, extra = SCHEDULERS[name]
    settings: dict[str, Any] = {
        "num_train_timesteps": contract.num_timesteps,
        "beta_start": contract.beta_start,
        "beta_end": contract.beta_end,
        "beta_schedule": contract.beta_schedule,
        "prediction_type": contract.prediction_type,
        "timestep_spacing": contract.timestep_spacing,
        "steps_offset": 1,
    }
    if contract.zero_terminal_snr:
        settings["rescale_betas_zero_snr"] = True
    return getattr(diffusers, class_name)(**settings, **extra)


def scheduler_warnings(name: str, contract: PairContract) -> list[str]:
    """What to say before drawing with it, in lines."""
    support = support_of(name, contract.prediction_type, contract.zero_terminal_snr)
    lines = [f"--scheduler {name} {support.why}"] if support.verdict == "warned" else []
    if contract.zero_terminal_snr and contract.timestep_spacing == "leading":
        last = contract.num_timesteps - 1
        lines.append(f"the experts' spacing 'leading' never comes to t = {last}, where there is nothing but noise")
    return lines


def first_whole_step(scheduler: Any, index: int) -> int:
    """The index of `scheduler.timesteps`, from `index` on, at which a step begins: Heun's have two evaluations."""
    return index + index % 2 if scheduler.order == 2 else index


def begin_at(scheduler: Any, index: int) -> None:
    """Let a scheduler whose timesteps are set begin at `index`, in place of the first."""
    if hasattr(scheduler, "set_begin_index"):  # DDIM keeps no index: it works from t
        scheduler.set_begin_index(index)


def noise_scale(scheduler: Any, index: int) -> float:
    """Spread of noise at step `index`: 1 where latents keep their variance, sqrt(sigma^2 + 1) where they do not."""
    if index == 0:
        return float(scheduler.init_noise_sigma)
    if scheduler.init_noise_sigma == 1:
        return 1.0
    return float((scheduler.sigmas[index] ** 2 + 1) ** 0.5)


def add_noise(scheduler: Any, x_0: Tensor, eps: Tensor, index: int) -> Tensor:
    """x_0 noised to step `index`, at which the scheduler begins, with that scheduler's own variance; fp32 [B, ...]."""
    t = scheduler.timesteps[index]
    noised: Tensor = scheduler.add_noise(x_0, eps, t.expand(len(x_0)))
    return noised


def takes_generator(scheduler: Any) -> bool:
    """Whether its steps may draw noise."""
    return "generator" in inspect.signature(scheduler.step).parameters
