"""The least that training is: a batch that is there already, noise, the UNet, its error, clipping, AdamW, an average.

What the trainer adds to this (a store, an order, draws by place, logs, skipping) is what `train_overhead` measures.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.train_world import DOWNSCALE, Shape
from shared.schedule import NoiseSchedule, scaled_linear_betas

LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Resident:
    """A batch on the device."""

    x_0: Tensor  # [B, 4, h, w]
    text: Tensor  # [B, 77, d]
    pooled: Tensor  # [B, p]
    time_ids: Tensor  # [B, 6]


def resident_batch(shape: Shape, batch: int, device: torch.device, dtype: torch.dtype) -> Resident:
    """Random tensors of a batch's shapes."""
    edge = shape.size_px // DOWNSCALE
    return Resident(
        torch.randn(batch, 4, edge, edge, device=device),
        torch.randn(batch, 77, sum(shape.text_widths), device=device, dtype=dtype),
        torch.randn(batch, shape.pooled_width, device=device, dtype=dtype),
        torch.full((batch, 6), float(shape.size_px), device=device),
    )


class BareLoop:
    """AdamW and an average over a UNet, a step at a time; nothing is read, logged or checked."""

    def __init__(self, unet_folder: Path, shape: Shape, batch: int, accumulation: int, device: torch.device) -> None:
        from diffusers import UNet2DConditionModel

        self._unet: Any = UNet2DConditionModel.from_pretrained(unet_folder, use_safetensors=True)
        self._unet.to(device).train()
        self._batch, self._accumulation = resident_batch(shape, batch, device, torch.float32), accumulation
        self._weights = list(self._unet.parameters())
        self._average = [weight.detach().clone() for weight in self._weights]
        self._adamw = torch.optim.AdamW(self._weights, lr=LEARNING_RATE, fused=True)
        self._schedule = NoiseSchedule(scaled_linear_betas(1000, 0.00085, 0.012))

    def step(self) -> None:
        """One optimizer step."""
        for _ in range(self._accumulation):
            torch.autograd.backward(self._loss() / self._accumulation)
        torch.nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._adamw.step()
        self._adamw.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self._average, self._weights, 0.001)

    def _loss(self) -> Tensor:
        resident = self._batch
        t = torch.randint(350, 1000, (len(resident.x_0),), device=resident.x_0.device)
        eps = torch.randn_like(resident.x_0)
        x_t = self._schedule.add_noise(resident.x_0, eps, t)
        added = {"text_embeds": resident.pooled, "time_ids": resident.time_ids}
        prediction = self._unet(x_t, t, resident.text, added_cond_kwargs=added, return_dict=False)[0]
        return torch.nn.functional.mse_loss(prediction.float(), eps)
