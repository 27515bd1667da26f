"""Hand-over exposure: some samples reach the expert as its partner hands them over, not as truth with noise on it.

    x_t' = alpha_t' x_0 + sigma_t' eps        t' above the edge, drawn over [high, high + reach)
    x^, eps^ of the partner's prediction at (x_t', t')
    x_t  = alpha_t x^ + sigma_t eps^          one DDIM step to t, the sample's own, in [high - reach, high)
    eps~ = (x_t - alpha_t x_0) / sigma_t      the noise that leads from there to the true x_0

In drawing an expert meets what the one before it made, errors and all; in training it meets the truth: exposure bias
(Ranzato et al. 2016, arXiv:1511.06732; of diffusion models Ning et al. 2023, arXiv:2301.11706). As in scheduled
sampling (Bengio et al. 2015, arXiv:1506.03099) the input is a model's own and the target stays the truth: eps~ takes
the place of eps in the objective, whatever it predicts, and x_t is then what NoiseSchedule.add_noise makes of x_0 and
eps~. The step is that of Song et al. 2021 (arXiv:2010.02502, equation 12, without noise). The partner predicts with
the caption and without guidance: a guided step leads to no x_0 of the data.

loss.py -> Exposure -> trainer/partner.py
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.conditioning import PromptEmbeds
from shared.schedule import NoiseSchedule, PredictionType, TimestepRange
from shared.seeding import derive_seed
from trainer.batch import Batch
from trainer.config import ExpertConfig
from trainer.exposure_config import chance_in_reach
from trainer.loss import Predict
from trainer.reparameterise import from_x_0, to_x_0


@dataclass(frozen=True)
class Exposure:
    """What of a batch comes from the partner, and the noise in it; whom it takes is a function of (seed, place, t)."""

    predict: Predict  # the partner's
    schedule: NoiseSchedule
    prediction_type: PredictionType
    within: TimestepRange  # of the expert that is trained
    reach: int
    chance: float  # of a sample within reach of the upper edge
    seed: int

    def __call__(self, batch: Batch, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """`eps` [B, 4, h, w] with eps~ in place of the noise of samples that come from the partner; t int64 [B].

        `batch` has its captions. Waits for the device once, to know whom to ask the partner for.
        """
        chosen = torch.nonzero(self.is_chosen(batch.places, t)).flatten()
        if not len(chosen):
            return eps
        above = self.begin(batch.places).to(t.device)[chosen]
        text = PromptEmbeds(batch.text.prompt_embeds[chosen], batch.text.pooled_prompt_embeds[chosen])
        x_0, own, t = x_0[chosen], eps[chosen], t[chosen]
        with torch.no_grad():
            x_above = self.schedule.add_noise(x_0, own, above)
            prediction = self.predict(x_above, above, text, batch.time_ids[chosen]).float()
            x_t = self._step(prediction, x_above, above, t)
        return eps.index_copy(0, chosen, from_x_0("epsilon", x_0, x_t, *self._alpha_sigma(t)))

    def is_chosen(self, places: Sequence[tuple[int, int]], t: Tensor) -> Tensor:
        """Which samples come from the partner, bool [B] on t's device."""
        draws = torch.tensor([derive_seed(self.seed, "exposure", *place) / 2**63 for place in places])
        is_near = (t >= self.within.high - self.reach) & (t < self.within.high)
        return is_near & (draws.to(t.device, non_blocking=True) < self.chance)

    def begin(self, places: Sequence[tuple[int, int]]) -> Tensor:
        """Timesteps t' at which the partner is asked, int64 [B] on the host, uniform over [high, high + reach)."""
        draws = (derive_seed(self.seed, "exposure t", *place) * self.reach >> 63 for place in places)
        return torch.tensor([self.within.high + draw for draw in draws])

    def _step(self, prediction: Tensor, x: Tensor, begin: Tensor, end: Tensor) -> Tensor:
        """x at `end` by a DDIM step without noise."""
        alpha, sigma = self._alpha_sigma(begin)
        x_0 = to_x_0(self.prediction_type, prediction, x, alpha, sigma)
        return self.schedule.add_noise(x_0, from_x_0("epsilon", x_0, x, alpha, sigma), end)

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.view(-1, 1, 1, 1)
        return self.schedule.alpha(t), self.schedule.sigma(t)


def exposure_to(predict: Predict, config: ExpertConfig, schedule: NoiseSchedule) -> Exposure:
    """The exposure that a configuration with a share above 0 asks for."""
    settings = config.loss.exposure
    chance = chance_in_reach(settings, config.loss.timestep_bias, config.range, len(schedule))
    kind = config.schedule.prediction_type
    return Exposure(predict, schedule, kind, config.range, settings.reach, chance, config.seed)
