"""The pair at work: whose range holds t, in one denoising loop over one scheduler, whose history crosses the boundary.

Each evaluation of a UNet is routed by its own t. Inputs are built per expert from its facts: layout, null prompt,
aesthetic score. Latents stay fp32; the UNets compute in their own dtype.

generate.py, evaluation -> ExpertEnsemble.draw -> the UNets (unet.py), schedulers.py
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shared.conditioning import MicroConditioning, PromptEmbeds
from shared.contract import ExpertFacts, PairContract
from shared.errors import ContractError
from shared.schedule import NoiseSchedule
from trainer.schedulers import add_noise, begin_at, first_whole_step, make_scheduler, noise_scale, takes_generator

ZERO_TERMINAL_RESCALE = 0.7  # Lin et al. 2023, section 3.4


class Denoiser(Protocol):
    """A UNet as ConditionedUnet calls it."""

    def __call__(self, x: Tensor, t: Tensor, text: PromptEmbeds, time_ids: Tensor, aesthetic_score: float) -> Tensor:
        """Its output [B, 4, h, w] at x [B, 4, h, w] and t, for SDXL-layout text and time_ids [B, 6]."""


@dataclass(frozen=True)
class DrawSettings:
    """How a picture is drawn."""

    steps: int = 40
    guidance: float | tuple[float, ...] = 9.2  # of all experts, or one for each in their order
    guidance_rescale: float | None = None
    scheduler: str = "unipc"

    def guidance_of(self, index: int) -> float:
        """Guidance of the expert of that index."""
        return self.guidance[index] if isinstance(self.guidance, tuple) else self.guidance

    def rescale(self, contract: PairContract) -> float:
        """Guidance rescale: as set, or 0.7 with zero-terminal SNR, where plain guidance overexposes, and 0 without."""
        if self.guidance_rescale is not None:
            return self.guidance_rescale
        return ZERO_TERMINAL_RESCALE if contract.zero_terminal_snr else 0.0


@dataclass(frozen=True)
class Expert:
    """A loaded expert."""

    facts: ExpertFacts
    model: Denoiser
    dtype: torch.dtype


@dataclass(frozen=True)
class Prompt:
    """Prompts of a batch for one expert: what to draw, and what stands against it."""

    positive: PromptEmbeds  # [B, n, d1 + d2], [B, p]
    negative: PromptEmbeds


@dataclass(frozen=True)
class Start:
    """Pictures to begin with in place of noise, and the timestep from which on they are drawn anew."""

    x_0: Tensor  # scaled latents fp32 [B, 4, h, w]
    timestep: float


@dataclass(frozen=True)
class ExpertEnsemble:
    """Experts that draw together; `check_pair` has agreed to them, or there is one alone."""

    experts: Sequence[Expert]
    contract: PairContract

    def at(self, t: float) -> int | None:
        """Index of the expert whose range holds t; None where no expert's does."""
        return expert_at([expert.facts for expert in self.experts], t)

    def plan(self, settings: DrawSettings, from_t: float | None = None) -> list[tuple[int, float, int]]:
        """The evaluations of a drawing: index in the scheduler's timesteps, t, and index of the expert it goes to.

        Those of timesteps at or below `from_t`, where it is given, for which an expert answers.
        """
        return plan_steps([expert.facts for expert in self.experts], self.contract, settings, from_t)

    def draw(
        self,
        prompts: Sequence[Prompt],
        sizes: Sequence[MicroConditioning],
        settings: DrawSettings,
        noise: Tensor,
        generators: Sequence[torch.Generator],
        start: Start | None = None,
    ) -> Tensor:
        """Scaled latents fp32 [B, 4, h, w] drawn from `noise` of that shape; `prompts` stand in the experts' order.

        Each picture has a size and, for schedulers that draw noise at each step, a generator of its own. With `start`
        drawing begins at the schedule's first timestep at or below start.timestep, with the picture noised to it.
        Timesteps that nobody answers for are left out: before the first expert's range the picture is noise, after
        the last one's it is that expert's own estimate of x_0. Raises ContractError where no timestep is left.
        """
        steps = self.plan(settings, None if start is None else start.timestep)
        scheduler, first = make_scheduler(settings.scheduler, self.contract), steps[0][0]
        scheduler.set_timesteps(settings.steps, device=noise.device)
        begin_at(scheduler, first)
        x = noise * noise_scale(scheduler, first) if start is None else add_noise(scheduler, start.x_0, noise, first)
        time_ids = torch.stack([size.time_ids() for size in sizes]).to(x.device)
        extra = {"generator": list(generators)} if takes_generator(scheduler) else {}
        for index, _, who in steps:
            t = scheduler.timesteps[index]
            x_t = scheduler.scale_model_input(x, t)
            prediction = self._guided(who, prompts[who], x_t, t, time_ids, settings)
            x = scheduler.step(prediction, t, x, return_dict=False, **extra)[0]
        if steps[-1][0] < len(scheduler.timesteps) - 1:
            return self._estimate(x_t, prediction, t)
        return x

    def _guided(
        self, who: int, prompt: Prompt, x_t: Tensor, t: Tensor, time_ids: Tensor, settings: DrawSettings
    ) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022), both halves in one batch, negative first."""
        expert, guidance = self.experts[who], settings.guidance_of(who)

        def predict(text: PromptEmbeds, copies: int, score: float) -> Tensor:
            x = torch.cat([x_t] * copies).to(expert.dtype)
            return expert.model(x, t, text, torch.cat([time_ids] * copies), score).float()

        facts = expert.facts
        if guidance <= 1:
            return predict(prompt.positive, 1, facts.aesthetic_score)
        if facts.layout == "sdxl":
            negative, positive = predict(_both(prompt), 2, facts.aesthetic_score).chunk(2)
        else:  # the halves differ in their score
            negative = predict(prompt.negative, 1, facts.negative_aesthetic_score)
            positive = predict(prompt.positive, 1, facts.aesthetic_score)
        guided = negative + guidance * (positive - negative)
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


def expert_at(facts: Sequence[ExpertFacts], t: float) -> int | None:
    """Index of the expert whose range holds t; None where no expert's does."""
    return next((i for i, own in enumerate(facts) if t in own.timesteps), None)


def plan_steps(
    facts: Sequence[ExpertFacts], contract: PairContract, settings: DrawSettings, from_t: float | None = None
) -> list[tuple[int, float, int]]:
    """`ExpertEnsemble.plan` by the experts' facts alone; raises ContractError where no step comes to any of them."""
    scheduler = make_scheduler(settings.scheduler, contract)
    scheduler.set_timesteps(settings.steps)
    routed = [(i, float(t), expert_at(facts, float(t))) for i, t in enumerate(scheduler.timesteps)]
    steps = [(i, t, who) for i, t, who in routed if who is not None and (from_t is None or t <= from_t)]
    steps = [step for step in steps if step[0] >= first_whole_step(scheduler, steps[0][0])]
    if not steps:
        below = "" if from_t is None else f" below {int(from_t) + 1}"
        raise ContractError(f"{settings.steps} steps never come to a timestep of {facts[-1].name}{below}")
    return steps


def rescale_guidance(guided: Tensor, positive: Tensor, share: float) -> Tensor:
    """Bring the spread of a guided prediction back towards the prompt's own (Lin et al. 2023, equations 15 and 16)."""
    if share == 0:
        return guided
    dims = list(range(1, guided.ndim))
    spread = guided.std(dim=dims, keepdim=True).clamp(min=torch.finfo(guided.dtype).tiny)  # a guess of nothing has none
    rescaled = guided * (positive.std(dim=dims, keepdim=True) / spread)
    return share * rescaled + (1 - share) * guided


def _both(prompt: Prompt) -> PromptEmbeds:
    return PromptEmbeds(
        torch.cat([prompt.negative.prompt_embeds, prompt.positive.prompt_embeds]),
        torch.cat([prompt.negative.pooled_prompt_embeds, prompt.positive.pooled_prompt_embeds]),
    )
