"""The objective of one expert: noise a batch, ask the UNet, weigh the error.

    x_0 = scaling_factor (mean + exp(logvar / 2) eps')      posterior sample, fresh in each epoch
    x_t = alpha_t x_0 + sigma_t eps
    loss = w(t) |prediction(x_t, t) - target(x_0, eps, t)|^2      mean over each sample; or pseudo-Huber

Timesteps are drawn once per optimizer step over all its samples; noise by a generator of each sample's own. So a run
does not depend on how its samples are spread over micro-batches, and a resumed run draws what an unbroken one would.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from shared.conditioning import PromptEmbeds
from shared.latents import sample_latents
from shared.schedule import (
    NoiseSchedule,
    PredictionType,
    TimestepRange,
    cumulate,
    sample_biased_timesteps,
    sample_timesteps,
)
from shared.seeding import make_generator
from trainer.batch import Batch
from trainer.caption_dropout import drop_captions, dropout_shares, may_drop
from trainer.config import LossConfig
from trainer.timestep_bias import timestep_shares

# (x_t [B, 4, h, w], t int64 [B], text, time_ids [B, 6]) -> prediction [B, 4, h, w]
Predict = Callable[[Tensor, Tensor, PromptEmbeds, Tensor], Tensor]
# (batch, x_0 and eps [B, 4, h, w], t int64 [B]) -> the noise that stands in for eps (trainer/exposure.py)
Expose = Callable[[Batch, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DenoisingLoss:
    """The loss of one expert on its range of timesteps."""

    schedule: NoiseSchedule
    within: TimestepRange
    prediction_type: PredictionType
    scaling_factor: float
    settings: LossConfig
    seed: int
    null_text: PromptEmbeds | None = None  # [1, ...], in place of captions that are dropped; None: zeros
    expose: Expose | None = None  # samples that come from the partner; None: there are none

    @cached_property
    def _dropout_shares(self) -> Tensor:
        return dropout_shares(self.settings.caption_dropout, self.within).to(self.schedule.device)

    @cached_property
    def _most_dropped(self) -> float:
        return float(self._dropout_shares.max())

    @cached_property
    def _bias_sums(self) -> Tensor:
        return cumulate(timestep_shares(self.settings.timestep_bias, self.within)).to(self.schedule.device)

    def timesteps(self, step: int, count: int, device: torch.device) -> Tensor:
        """Timesteps of all `count` samples of optimizer step `step`, int64 [count], stratified over its range."""
        generator = make_generator(self.seed, "t", step, device=device)
        if self.settings.timestep_bias.strategy == "none":
            return sample_timesteps(self.within, count, generator)
        return sample_biased_timesteps(self.within, self._bias_sums, count, generator)

    def __call__(self, predict: Predict, batch: Batch, t: Tensor) -> Tensor:
        """Loss per sample, fp32 [B], at timesteps t [B], with the draws of each sample's place: dropout and noises.

        Offset noise (Guttenberg 2023, "Diffusion with offset noise") belongs to eps, so it is learned; input
        perturbation (Ning et al. 2023, arXiv:2301.11706) is shown to the UNet and not asked of it.
        """
        posterior_eps, eps = self.noise("posterior", batch), self.noise("eps", batch)
        if self.settings.offset_noise:
            a_pixel = batch.moments.mean[..., :1, :1]
            eps = eps + self.settings.offset_noise * place_noise(self.seed, "offset", batch.places, a_pixel)
        if self.expose is not None:
            x_0 = sample_latents(batch.moments, self.scaling_factor, posterior_eps)
            eps = self.expose(batch, x_0, eps, t)
        if may_drop(batch.places, self._most_dropped, self.seed):
            batch = drop_captions(batch, self._dropout_shares[t - self.within.low], self.null_text, self.seed)
        shown_eps = eps
        if self.settings.input_perturbation:
            shown_eps = eps + self.settings.input_perturbation * self.noise("perturbation", batch)
        return self.at(predict, batch, t, eps, posterior_eps, shown_eps)

    def at(
        self,
        predict: Predict,
        batch: Batch,
        t: Tensor,
        eps: Tensor,
        posterior_eps: Tensor,
        shown_eps: Tensor | None = None,
    ) -> Tensor:
        """Loss per sample, fp32 [B], at given t [B], noise and posterior noise [B, 4, h, w].

        `shown_eps` takes the place of `eps` in x_t alone.
        """
        x_0 = sample_latents(batch.moments, self.scaling_factor, posterior_eps)
        x_t = self.schedule.add_noise(x_0, eps if shown_eps is None else shown_eps, t)
        target = self.schedule.target(self.prediction_type, x_0, eps, t)
        prediction = predict(x_t, t, batch.text, batch.time_ids).float()
        loss = self._distance(prediction - target, t).flatten(1).mean(dim=1)
        if self.settings.min_snr_gamma is not None:
            loss = loss * self.schedule.min_snr_weight(self.prediction_type, self.settings.min_snr_gamma, t)
        return loss

    def unweighted(self) -> "DenoisingLoss":
        """The plain squared error of the same prediction: what runs of other settings can be compared by."""
        return replace(self, settings=LossConfig())

    def _distance(self, error: Tensor, t: Tensor) -> Tensor:
        if self.settings.type == "mse":
            return error.square()
        return pseudo_huber(error, self.schedule.huber_c(self.settings.huber_schedule, self.settings.huber_c, t))

    def noise(self, what: str, batch: Batch) -> Tensor:
        """Standard normal noise in the shape of the latents, one generator per sample, on the batch's device."""
        return place_noise(self.seed, what, batch.places, batch.moments.mean)


def pseudo_huber(error: Tensor, c: Tensor) -> Tensor:
    """2 c (sqrt(error^2 + c^2) - c): error^2 where it is far below c, 2 c |error| far above (Khrapov et al. 2024).

    `error` [B, ...], `c` > 0 [B]. Written so that small errors do not cancel: sqrt(e^2 + c^2) - c loses them.
    """
    c = c.view(-1, *(1,) * (error.ndim - 1))
    return 2 * c * error.square() / (torch.sqrt(error.square() + c.square()) + c)


def place_noise(seed: int, what: str, places: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """fp32 noise [B, ...] in the shape of `like`; sample i is a function of (seed, what, places[i])."""
    noise = torch.empty(like.shape, device=like.device)
    for row, (epoch, position) in zip(noise, places, strict=True):
        row.normal_(generator=make_generator(seed, what, epoch, position, device=like.device))
    return noise
