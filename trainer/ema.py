"""Exponential moving average of the weights that are trained, in fp32 beside the model."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from shared.errors import CheckpointError


class Ema:
    """shadow <- d shadow + (1 - d) weights after each step, d = min(decay, (1 + n) / (10 + n)) while n is small."""

    def __init__(self, model: nn.Module, decay: float, updates: int = 0) -> None:
        self.decay, self.updates = decay, updates
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._names, self._weights = list(trained), list(trained.values())
        self._shadow = [weight.detach().clone().float() for weight in self._weights]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's weights as they are now."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._shadow, [weight.float() for weight in self._weights], 1 - decay)
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights by the model's names, without those that are frozen."""
        return dict(zip(self._names, self._shadow, strict=True))

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over averaged weights; raises CheckpointError where one is missing or of another shape."""
        for name, shadow in zip(self._names, self._shadow, strict=True):
            if name not in state or state[name].shape != shadow.shape:
                raise CheckpointError(f"the averaged weights hold no {name} of shape {tuple(shadow.shape)}")
            shadow.copy_(state[name])
