"""Room on a device for some models at a time; the others wait in main memory, which is where they were loaded.

Drawing has stages that need the device one after another: VAE (given pictures to latents), UNets, VAE (latents to
pictures). With --offload the UNets take turns too. Weights are copied to the device and never back.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shared.conditioning import PromptEmbeds
from shared.device import free_unused_memory
from trainer.unet import ConditionedUnet

Place = tuple[nn.Module, str, Tensor]  # where a tensor belongs, and the one that waits in main memory


class Berth:
    """Holds on `device` the modules that were asked for last; of each of their tensors it knows what waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: dict[nn.Module, list[Place]] = {}

    def bring(self, modules: Sequence[nn.Module]) -> None:
        """Have these modules on the device, and no others; on a CPU, where all are anyway, nothing is done."""
        if self.device.type == "cpu":
            return
        leaving = [held for held in self._held if held not in modules]
        for module in leaving:
            for owner, name, tensor in self._held.pop(module):
                setattr(owner, name, tensor)
        if leaving:
            free_unused_memory()
        for module in modules:
            if module not in self._held:
                self._held[module] = list(_places(module))
                for owner, name, tensor in self._held[module]:
                    setattr(owner, name, self._moved(tensor))

    def give_up(self, modules: Sequence[nn.Module]) -> None:
        """Free what these modules hold on the device and in main memory; nobody may ask them again."""
        for module in modules:
            self._held.pop(module, None)
            module.to("meta")
        free_unused_memory()

    def _moved(self, tensor: Tensor) -> Tensor:
        moved = tensor.data.to(self.device)
        return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved


def _places(module: nn.Module) -> Iterator[Place]:
    for owner in module.modules():
        for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
            yield owner, name, tensor


@dataclass(frozen=True)
class OffloadedUnet:
    """A UNet that comes to the device when it is asked, in place of the one that was."""

    model: ConditionedUnet
    berth: Berth

    def __call__(self, x: Tensor, t: Tensor, text: PromptEmbeds, time_ids: Tensor, aesthetic_score: float) -> Tensor:
        """What the UNet answers."""
        self.berth.bring([self.model.unet])
        return self.model(x, t, text, time_ids, aesthetic_score)
