"""The pair at work: whose range holds t, in one denoising loop over one scheduler, whose history crosses the boundary.

Each evaluation of a UNet is routed by its own t. Inputs are built per expert from its facts: layout, null prompt,
aesthetic score. Latents stay fp32; the UNets compute in their own dtype.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.conditioning import MicroConditioning, PromptEmbeds
from shared.contract import ExpertFacts, PairContract
from shared.errors import ConfigError, ContractError
from shared.schedule import NoiseSchedule
from trainer.unet import ConditionedUnet

# Schedulers by the name that people use: diffusers' class, and settings beyond what the contract says.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "unipc": ("UniPCMultistepScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
}
ZERO_TERMINAL_RESCALE = 0.7  # Lin et al. 2023, section 3.4


@dataclass(frozen=True)
class DrawSettings:
    """How a picture is drawn."""

    steps: int = 40
    guidance: float = 9.2
    guidance_rescale: float | None = None
    scheduler: str = "unipc"

    def rescale(self, contract: PairContract) -> float:
        """Guidance rescale: as set, or 0.7 with zero-terminal SNR, where plain guidance overexposes, and 0 without."""
        if self.guidance_rescale is not None:
            return self.guidance_rescale
        return ZERO_TERMINAL_RESCALE if contract.zero_terminal_snr else 0.0


@dataclass(frozen=True)
class Expert:
    """A loaded expert."""

    facts: ExpertFacts
    model: ConditionedUnet
    dtype: torch.dtype


@dataclass(frozen=True)
class Prompt:
    """One prompt for one expert: what to draw, and what stands against it."""

    positive: PromptEmbeds  # [1, n, d1 + d2], [1, p]
    negative: PromptEmbeds


@dataclass(frozen=True)
class ExpertEnsemble:
    """Experts that draw together; `check_pair` has agreed to them, or there is one alone."""

    experts: Sequence[Expert]
    contract: PairContract

    def at(self, t: float) -> int | None:
        """Index of the expert whose range holds t; None where no expert's does."""
        return next((i for i, expert in enumerate(self.experts) if t in expert.facts.timesteps), None)

    def draw(
        self,
        prompts: Sequence[Prompt],
        size_hw: tuple[int, int],
        settings: DrawSettings,
        noise: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Scaled latents fp32 [1, 4, h, w] drawn from `noise` of that shape; `prompts` stand in the experts' order.

        Timesteps that nobody answers for are left out: before the first expert's range the picture is noise, after
        the last one's it is that expert's own estimate of x_0. Raises ContractError where no timestep is left.
        """
        scheduler = make_scheduler(settings.scheduler, self.contract)
        scheduler.set_timesteps(settings.steps, device=noise.device)
        routed = [(i, t, self.at(float(t))) for i, t in enumerate(scheduler.timesteps)]
        routed = [step for step in routed if step[2] is not None]
        if not routed:
            raise ContractError(f"{settings.steps} steps never come to a timestep of {self.experts[0].facts.name}")
        first, last = routed[0][0], routed[-1][0]
        if hasattr(scheduler, "set_begin_index"):  # DDIM keeps no index: it works from t
            scheduler.set_begin_index(first)
        x = noise * _noise_scale(scheduler, first)
        time_ids = MicroConditioning(size_hw, (0, 0), size_hw).time_ids()[None].to(x.device)
        ancestral = "generator" in inspect.signature(scheduler.step).parameters
        extra = {"generator": generator} if ancestral else {}
        for _, t, index in routed:
            assert index is not None
            x_t = scheduler.scale_model_input(x, t)
            prediction = self._guided(self.experts[index], prompts[index], x_t, t, time_ids, settings)
            x = scheduler.step(prediction, t, x, return_dict=False, **extra)[0]
        if last < len(scheduler.timesteps) - 1:
            return self._estimate(x_t, prediction, t)
        return x

    def _guided(
        self, expert: Expert, prompt: Prompt, x_t: Tensor, t: Tensor, time_ids: Tensor, settings: DrawSettings
    ) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022), both halves in one batch, negative first."""

        def predict(text: PromptEmbeds, count: int, score: float) -> Tensor:
            x = torch.cat([x_t] * count).to(expert.dtype)
            return expert.model(x, t, text, time_ids.expand(count, -1), score).float()

        facts = expert.facts
        if settings.guidance <= 1:
            return predict(prompt.positive, 1, facts.aesthetic_score)
        if facts.layout == "sdxl":
            negative, positive = predict(_both(prompt), 2, facts.aesthetic_score).chunk(2)
        else:  # the halves differ in their score
            negative = predict(prompt.negative, 1, facts.negative_aesthetic_score)
            positive = predict(prompt.positive, 1, facts.aesthetic_score)
        guided = negative + settings.guidance * (positive - negative)
        return rescale_guidance(guided, positive, settings.rescale(self.contract))

    def _estimate(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """x_0 from the last prediction; x_t variance-preserving, as UNets see it."""
        schedule: NoiseSchedule = self.contract.schedule(x_t.device)
        nearest = t.round().long().view(1)
        alpha, sigma = schedule.alpha(nearest), schedule.sigma(nearest)
        if self.contract.prediction_type == "v_prediction":
            return alpha * x_t - sigma * prediction
        if self.contract.prediction_type == "epsilon":
            return (x_t - sigma * prediction) / alpha
        return prediction


def rescale_guidance(guided: Tensor, positive: Tensor, share: float) -> Tensor:
    """Bring the spread of a guided prediction back towards the prompt's own (Lin et al. 2023, equations 15 and 16)."""
    if share == 0:
        return guided
    dims = list(range(1, guided.ndim))
    rescaled = guided * (positive.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True))
    return share * rescaled + (1 - share) * guided


def make_scheduler(name: str, contract: PairContract) -> Any:
    """diffusers' scheduler of that name for this contract; raises ConfigError where it cannot serve it."""
    if name not in SCHEDULERS:
        raise ConfigError(f"--scheduler {name}: known are {', '.join(SCHEDULERS)}")
    import diffusers

    class_name, extra = SCHEDULERS[name]
    scheduler_class = getattr(diffusers, class_name)
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
        if "rescale_betas_zero_snr" not in inspect.signature(scheduler_class.__init__).parameters:
            raise ConfigError(f"--scheduler {name} ignores zero-terminal SNR, which these experts were trained with")
        settings["rescale_betas_zero_snr"] = True
    if name == "euler-a" and contract.prediction_type == "sample":
        raise ConfigError("--scheduler euler-a cannot draw with experts that predict x_0 ('sample')")
    return scheduler_class(**settings, **extra)


def _noise_scale(scheduler: Any, index: int) -> float:
    """Spread of the latents at step `index`: 1 where they keep their variance, sqrt(sigma^2 + 1) where they do not."""
    if index == 0:
        return float(scheduler.init_noise_sigma)
    if scheduler.init_noise_sigma == 1:
        return 1.0
    return float((scheduler.sigmas[index] ** 2 + 1) ** 0.5)


def _both(prompt: Prompt) -> PromptEmbeds:
    return PromptEmbeds(
        torch.cat([prompt.negative.prompt_embeds, prompt.positive.prompt_embeds]),
        torch.cat([prompt.negative.pooled_prompt_embeds, prompt.positive.pooled_prompt_embeds]),
    )
