"""What the UNet is trained on: one micro-batch, shapes checked once here and trusted from here on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.conditioning import PromptEmbeds
from shared.errors import DataError
from shared.latents import LatentMoments


@dataclass(frozen=True)
class Batch:
    """b samples of one bucket."""

    moments: LatentMoments  # mean and logvar, each [B, 4, h, w]
    text: PromptEmbeds  # prompt_embeds [B, n, d1 + d2], pooled [B, p]
    time_ids: Tensor  # fp32 [B, 6]
    places: list[tuple[int, int]]  # (epoch, position) of each sample: labels of its draws

    def __post_init__(self) -> None:
        count = len(self.places)
        tensors = (self.moments.mean, self.text.prompt_embeds, self.text.pooled_prompt_embeds, self.time_ids)
        if any(len(tensor) != count for tensor in tensors) or self.time_ids.shape[1:] != (6,):
            raise DataError(f"a batch of {count} samples holds {[tuple(tensor.shape) for tensor in tensors]}")

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; from pinned memory the copy does not wait."""
        if self.time_ids.device == device:
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        logvar = self.moments.logvar
        return Batch(
            LatentMoments(move(self.moments.mean), None if logvar is None else move(logvar)),
            PromptEmbeds(move(self.text.prompt_embeds), move(self.text.pooled_prompt_embeds)),
            move(self.time_ids),
            self.places,
        )
