"""torch's own optimizers: fused AdamW (Loshchilov & Hutter 2019), and Muon (Jordan et al. 2024) for what multiplies."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.optimizer_config import OptimizerConfig

MUON_SMALLEST = 16  # a matrix with a shorter side, such as a last layer's, is left to AdamW
_ADAMW_ITEMS = ("step", "exp_avg", "exp_avg_sq")


class AdamWRule:
    """Fused AdamW, which can skip a step on the device (found_inf) without asking the host."""

    def __init__(self, parameters: Mapping[int, nn.Parameter], config: OptimizerConfig) -> None:
        self._places = list(parameters)
        self._adamw = torch.optim.AdamW(
            [{"params": list(parameters.values())}],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """torch's."""
        return self._adamw.param_groups

    def step(self, is_bad: Tensor) -> None:
        """One step, or none where `is_bad` is 1."""
        scaled: Any = self._adamw  # these attributes are the protocol that torch.amp.GradScaler speaks
        scaled.grad_scale = None
        scaled.found_inf = is_bad
        self._adamw.step()

    def weights(self) -> None:
        """None but the parameters themselves."""
        return

    def tensors(self) -> dict[str, Tensor]:
        """Both moments and the count of steps of each parameter."""
        state: dict[int, dict[str, Any]] = self._adamw.state_dict()["state"]
        return {f"{self._places[i]}.{name}": tensor for i, entry in state.items() for name, tensor in entry.items()}

    def wanted(self) -> set[str]:
        """Three items of each parameter."""
        return {f"{place}.{name}" for place in self._places for name in _ADAMW_ITEMS}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a state, moments in their weight's own order in memory: the fused step goes by that alone."""
        state = {
            i: {name: _laid_out_as(weight, tensors[f"{place}.{name}"]) for name in _ADAMW_ITEMS}
            for i, (place, weight) in enumerate(zip(self._places, self.param_groups[0]["params"], strict=True))
        }
        self._adamw.load_state_dict({"state": state, "param_groups": self._adamw.state_dict()["param_groups"]})


class MuonRule:
    """torch's Muon takes matrices alone; a convolution is seen as one of [out, in * kernel], as its authors do."""

    def __init__(self, parameters: Mapping[int, nn.Parameter], config: OptimizerConfig) -> None:
        self._parameters = parameters
        self._views = {place: as_matrix(parameter.detach()) for place, parameter in parameters.items()}
        self._muon: Any = torch.optim.Muon(
            list(self._views.values()),
            lr=config.muon_rate,
            weight_decay=config.weight_decay,
            adjust_lr_fn="original",
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """torch's."""
        groups: list[dict[str, Any]] = self._muon.param_groups
        return groups

    @torch.no_grad()
    def step(self, is_bad: Tensor) -> None:
        """Muon knows no found_inf, so weights and momentum from before are put back where the step was bad."""
        for place, view in self._views.items():
            gradient = self._parameters[place].grad
            view.grad = None if gradient is None else as_matrix(gradient)
        before = {place: view.clone() for place, view in self._views.items()}
        momentum_before = {place: tensor.clone() for place, tensor in self._momentum().items()}
        self._muon.step()
        for place, view in self._views.items():
            view.copy_(torch.where(is_bad > 0, before[place], view))
            view.grad = None
        for place, tensor in self._momentum().items():
            tensor.copy_(torch.where(is_bad > 0, momentum_before.get(place, torch.zeros_like(tensor)), tensor))

    def _momentum(self) -> dict[int, Tensor]:
        """Muon's state by the parameters' places; empty before the first step."""
        state = self._muon.state
        return {place: state[view]["momentum_buffer"] for place, view in self._views.items() if state.get(view)}

    def weights(self) -> None:
        """None but the parameters themselves."""
        return

    def tensors(self) -> dict[str, Tensor]:
        """The momentum of each matrix."""
        return {f"{place}.momentum_buffer": tensor for place, tensor in self._momentum().items()}

    def wanted(self) -> set[str]:
        """One item of each matrix."""
        return {f"{place}.momentum_buffer" for place in self._views}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a state."""
        for place, view in self._views.items():
            self._muon.state[view] = {"momentum_buffer": tensors[f"{place}.momentum_buffer"].to(view)}


def multiplies(parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix, or a convolution's weight, that is worth Muon's while."""
    return parameter.ndim > 1 and min(parameter.flatten(1).shape) >= MUON_SMALLEST


def as_matrix(tensor: Tensor) -> Tensor:
    """A view [out, in * kernel] of a tensor; columns in the order in which they lie in memory."""
    if tensor.ndim == 4 and not tensor.is_contiguous():  # channels last
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.view(len(tensor), -1)


def _laid_out_as(weight: Tensor, tensor: Tensor) -> Tensor:
    if tensor.ndim != 4 or weight.is_contiguous():
        return tensor
    return torch.empty_like(weight, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
