"""What turns gradients into steps, and its state as tensors with names: what a checkpoint can hold without pickle.

AdamW for every parameter, or Muon (Jordan et al. 2024) for those that multiply, which are most, and AdamW for the rest.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import CheckpointError
from trainer.config import OptimizerConfig

MUON_SMALLEST = 16  # a matrix with a shorter side, such as a last layer's, is left to AdamW
_ADAMW_ITEMS, _MUON_ITEMS = {"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}


class Optimizer:
    """Fused AdamW, which can skip a step on the device (found_inf) without asking the host, and Muon where configured.

    torch's Muon takes matrices alone; a convolution's weight is seen as one of [out, in * kernel], as its authors do.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> None:
        self._parameters = list(parameters)
        is_matrix = [config.name == "muon" and _multiplies(parameter) for parameter in self._parameters]
        self._others = [i for i, chosen in enumerate(is_matrix) if not chosen]
        self._matrices = [i for i, chosen in enumerate(is_matrix) if chosen]
        self._views = [self._parameters[i].detach().view(len(self._parameters[i]), -1) for i in self._matrices]
        self._adamw = torch.optim.AdamW(
            [{"params": [self._parameters[i] for i in self._others]}],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._muon: Any = None
        if self._views:
            self._muon = torch.optim.Muon(
                self._views, lr=config.muon_rate, weight_decay=config.weight_decay, adjust_lr_fn="original"
            )
        self._rates = [group["lr"] for group in self.param_groups]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """torch's groups of both."""
        groups: list[dict[str, Any]] = self._adamw.param_groups + (self._muon.param_groups if self._muon else [])
        return groups

    def scale_rates(self, share: float) -> None:
        """Set the learning rates to this share of the configured ones."""
        for group, rate in zip(self.param_groups, self._rates, strict=True):
            group["lr"] = rate * share

    def zero_grad(self) -> None:
        """Let go of all gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def step_unless_bad(self, is_bad: Tensor) -> None:
        """One step, or none where `is_bad` (a scalar, 0.0 or 1.0, on the weights' device) is 1."""
        scaled: Any = self._adamw  # these attributes are the protocol that torch.amp.GradScaler speaks
        scaled.grad_scale = None
        scaled.found_inf = is_bad
        self._adamw.step()
        if self._muon:
            self._step_muon(is_bad)

    @torch.no_grad()
    def _step_muon(self, is_bad: Tensor) -> None:
        """Muon knows no found_inf, so weights and momentum from before are put back where the step was bad."""
        for i, view in zip(self._matrices, self._views, strict=True):
            gradient = self._parameters[i].grad
            view.grad = None if gradient is None else gradient.view_as(view)
        before = [view.clone() for view in self._views]
        momentum_before = {i: tensor.clone() for i, tensor in self._momentum().items()}
        self._muon.step()
        for view, old in zip(self._views, before, strict=True):
            view.copy_(torch.where(is_bad > 0, old, view))
            view.grad = None
        for i, tensor in self._momentum().items():
            tensor.copy_(torch.where(is_bad > 0, momentum_before.get(i, torch.zeros_like(tensor)), tensor))

    def _momentum(self) -> dict[int, Tensor]:
        """Muon's state by the parameters' places; empty before the first step."""
        pairs = zip(self._matrices, self._views, strict=True)
        return {i: self._muon.state[view]["momentum_buffer"] for i, view in pairs if self._muon.state.get(view)}

    def tensors(self) -> dict[str, Tensor]:
        """The state as {"<index>.<name>": tensor}; indices count the parameters in order."""
        state: dict[int, dict[str, Any]] = self._adamw.state_dict()["state"]
        named = {f"{self._others[index]}.{name}": t for index, entry in state.items() for name, t in entry.items()}
        return named | {f"{i}.momentum_buffer": tensor for i, tensor in self._momentum().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take a state over; hyperparameters stay as configured. Raises CheckpointError where an item is missing."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = tensor
        wanted = dict.fromkeys(self._others, _ADAMW_ITEMS) | dict.fromkeys(self._matrices, _MUON_ITEMS)
        if {index: set(entry) for index, entry in state.items()} != wanted:
            names = "AdamW and Muon" if self._muon else "AdamW"
            raise CheckpointError(f"the optimizer state is not that of {len(wanted)} parameters under {names}")
        own = {place: state[index] for place, index in enumerate(self._others)}
        self._adamw.load_state_dict({"state": own, "param_groups": self._adamw.state_dict()["param_groups"]})
        for i, view in zip(self._matrices, self._views, strict=True):
            self._muon.state[view] = {"momentum_buffer": state[i]["momentum_buffer"].to(view)}


def _multiplies(parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix, or a convolution's weight, that is worth Muon's while."""
    return parameter.ndim > 1 and min(parameter.flatten(1).shape) >= MUON_SMALLEST
