"""The objective of one expert: noise a batch, ask the UNet, weigh the squared error.

    x_0 = scaling_factor (mean + exp(logvar / 2) eps')      posterior sample, fresh in each epoch
    x_t = alpha_t x_0 + sigma_t eps
    loss = w(t) |prediction(x_t, t) - target(x_0, eps, t)|^2      mean over each sample

Timesteps are drawn once per optimizer step over all its samples; noise by a generator of each sample's own. So a run
does not depend on how its samples are spread over micro-batches, and a resumed run draws what an unbroken one would.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.conditioning import PromptEmbeds
from shared.latents import sample_latents
from shared.schedule import NoiseSchedule, PredictionType, TimestepRange, sample_timesteps
from shared.seeding import make_generator
from trainer.batch import Batch

# (x_t [B, 4, h, w], t int64 [B], text, time_ids [B, 6]) -> prediction [B, 4, h, w]
Predict = Callable[[Tensor, Tensor, PromptEmbeds, Tensor], Tensor]


@dataclass(frozen=True)
class DenoisingLoss:
    """The loss of one expert on its range of timesteps."""

    schedule: NoiseSchedule
    within: TimestepRange
    prediction_type: PredictionType
    scaling_factor: float
    min_snr_gamma: float | None
    seed: int

    def timesteps(self, step: int, count: int, device: torch.device) -> Tensor:
        """Timesteps of all `count` samples of optimizer step `step`, int64 [count], stratified over the range."""
        return sample_timesteps(self.within, count, make_generator(self.seed, "t", step, device=device))

    def __call__(self, predict: Predict, batch: Batch, t: Tensor) -> Tensor:
        """Loss per sample, fp32 [B], at timesteps t [B], with the posterior and the noise of each sample's place."""
        posterior_eps = self.noise("posterior", batch)
        return self.at(predict, batch, t, self.noise("eps", batch), posterior_eps)

    def at(self, predict: Predict, batch: Batch, t: Tensor, eps: Tensor, posterior_eps: Tensor) -> Tensor:
        """Loss per sample, fp32 [B], at given t [B], noise and posterior noise [B, 4, h, w]."""
        x_0 = sample_latents(batch.moments, self.scaling_factor, posterior_eps)
        x_t = self.schedule.add_noise(x_0, eps, t)
        target = self.schedule.target(self.prediction_type, x_0, eps, t)
        prediction = predict(x_t, t, batch.text, batch.time_ids).float()
        loss = (prediction - target).square().flatten(1).mean(dim=1)
        if self.min_snr_gamma is not None:
            loss = loss * self.schedule.min_snr_weight(self.prediction_type, self.min_snr_gamma, t)
        return loss

    def noise(self, what: str, batch: Batch) -> Tensor:
        """Standard normal noise in the shape of the latents, one generator per sample, on the batch's device."""
        return place_noise(self.seed, what, batch.places, batch.moments.mean)


def place_noise(seed: int, what: str, places: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """fp32 noise [B, ...] in the shape of `like`; sample i is a function of (seed, what, places[i])."""
    rows = []
    for epoch, position in places:
        generator = make_generator(seed, what, epoch, position, device=like.device)
        rows.append(torch.randn(like.shape[1:], generator=generator, device=like.device))
    return torch.stack(rows)
