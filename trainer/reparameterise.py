"""A UNet that was taught to predict one thing, asked for another: eps, v and x_0 say the same wherever x_t is known.

    x_0 = (x_t - sigma eps) / alpha = alpha x_t - sigma v      eps = (x_t - alpha x_0) / sigma      (Salimans & Ho 2022)

Where alpha is 0, eps says nothing of x_0: it is then taken to be 0, the mean.
"""

from typing import Any

import torch
from torch import Tensor

from shared.contract import PairContract
from shared.schedule import PredictionType


class Reparameterised:
    """A UNet in whose place it stands: called like it, answering in the contract's prediction type."""

    def __init__(self, unet: Any, contract: PairContract, gives: PredictionType) -> None:
        self._unet, self._gives, self._wants = unet, gives, contract.prediction_type
        self._contract = contract
        self._schedule = contract.schedule()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)

    def __call__(self, x: Tensor, t: Tensor, **inputs: Any) -> tuple[Tensor]:
        """(prediction [B, 4, h, w],) at x_t [B, 4, h, w] and t, of shape [B] or none."""
        answer = self._unet(x, t, **inputs)[0]
        if self._schedule.device != x.device:
            self._schedule = self._contract.schedule(x.device)
        nearest = t.round().long().reshape(-1, 1, 1, 1)
        alpha, sigma = self._schedule.alpha(nearest), self._schedule.sigma(nearest)
        x_0 = to_x_0(self._gives, answer.float(), x.float(), alpha, sigma)
        return (from_x_0(self._wants, x_0, x.float(), alpha, sigma).to(answer.dtype),)


def to_x_0(gives: PredictionType, answer: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_0 of a prediction; alpha and sigma are broadcast against it."""
    if gives == "sample":
        return answer
    if gives == "v_prediction":
        return alpha * x_t - sigma * answer
    return torch.where(alpha > 0, (x_t - sigma * answer) / alpha.clamp(min=1e-12), torch.zeros_like(x_t))


def from_x_0(wants: PredictionType, x_0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The prediction that says x_0; sigma is never 0."""
    if wants == "sample":
        return x_0
    eps = (x_t - alpha * x_0) / sigma
    return eps if wants == "epsilon" else alpha * eps - sigma * x_0
