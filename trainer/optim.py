"""What turns gradients into steps, and its state as tensors with names: what a checkpoint can hold without pickle.

    torch_rules.py     AdamW, and Muon for those that multiply: torch's own
    library_rules.py   8-bit AdamW, Adafactor, schedule-free AdamW: other libraries'
    kahan.py           AdamW for bf16 weights, with what rounding takes away kept beside them

Each takes a step, or none where a flag on the device says that the gradients were bad; nobody waits for that flag.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shared.errors import CheckpointError
from trainer.kahan import KahanRule
from trainer.library_rules import LIBRARIES, LibraryRule
from trainer.optimizer_config import OptimizerConfig
from trainer.torch_rules import AdamWRule, MuonRule, multiplies


class Rule(Protocol):
    """How some of the parameters are stepped; tensors are named "<place of the parameter>.<item>"."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups in torch's sense, of which "lr" is read at each step."""

    def step(self, is_bad: Tensor) -> None:
        """One step, or none where `is_bad` (a scalar, 0.0 or 1.0) is 1."""

    def weights(self) -> Iterator[Tensor] | None:
        """Weights to evaluate and average, one after another; None where they are the parameters themselves.

        A rule that has its own takes all parameters.
        """

    def tensors(self) -> dict[str, Tensor]:
        """The state."""

    def wanted(self) -> set[str]:
        """Names of all tensors of the state once there has been a step."""

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a state that has the wanted names."""


class Optimizer:
    """The rules that a configuration asks for, over all parameters in their order."""

    def __init__(self, parameters: Iterable[nn.Parameter], config: OptimizerConfig, *, is_lean: bool = False) -> None:
        self._parameters = list(parameters)
        self._weights = [parameter.detach() for parameter in self._parameters]
        self._name = "bf16-lean AdamW" if is_lean else _NAMES[config.name]
        self._rules = _choose_rules(self._parameters, config, is_lean)
        self._rates = [group["lr"] for group in self.param_groups]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """torch's groups of all rules."""
        return [group for rule in self._rules for group in rule.param_groups]

    @property
    def learning_rate(self) -> float:
        """The rate that the next step is taken with; AdamW's where Muon has one of its own."""
        return float(self.param_groups[0]["lr"])

    def scale_rates(self, share: float) -> None:
        """Set the learning rates to this share of the configured ones."""
        for group, rate in zip(self.param_groups, self._rates, strict=True):
            group["lr"] = rate * share

    def zero_grad(self) -> None:
        """Let go of all gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def clip(self, most: float) -> Tensor:
        """The norm of all gradients together, which are scaled down to `most` where it is larger; 0 does not scale."""
        norm = self._rules[0].fused_norm() if isinstance(self._rules[0], KahanRule) else None
        return torch.nn.utils.clip_grad_norm_(self._parameters, most or float("inf")) if norm is None else norm

    def step_unless_bad(self, is_bad: Tensor) -> None:
        """One step, or none where `is_bad` (a scalar, 0.0 or 1.0, on the weights' device) is 1."""
        for rule in self._rules:
            rule.step(is_bad)

    def weights(self) -> Iterable[Tensor]:
        """The weights to average, in order: those that are trained, but for what a rule knows better."""
        own = self._rules[0].weights()
        return self._weights if own is None else own

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """In here the parameters are those to evaluate and save; afterwards, bit for bit, those to train."""
        is_average = any(isinstance(rule, LibraryRule) and rule.is_average for rule in self._rules)
        trained = [weight.clone() for weight in self._weights] if is_average else []
        for weight, average in zip(self._weights, self.weights(), strict=True) if is_average else ():
            weight.copy_(average)
        try:
            yield
        finally:
            for weight, own in zip(self._weights, trained, strict=False):
                weight.copy_(own)

    def tensors(self) -> dict[str, Tensor]:
        """The state as {"<index>.<name>": tensor}; indices count the parameters in order."""
        return {name: tensor for rule in self._rules for name, tensor in rule.tensors().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take a state over; hyperparameters stay as configured. Raises CheckpointError where an item is missing."""
        wanted = [rule.wanted() for rule in self._rules]
        if set(tensors) != set().union(*wanted):
            raise CheckpointError(
                f"the optimizer state is not that of {len(self._parameters)} parameters under {self._name}"
            )
        for rule, names in zip(self._rules, wanted, strict=True):
            rule.load({name: tensors[name] for name in names})


_NAMES = {
    "adamw": "AdamW",
    "muon": "AdamW and Muon",
    "adamw-8bit": "8-bit AdamW",
    "adafactor": "Adafactor",
    "schedule-free": "schedule-free AdamW",
}


def _choose_rules(parameters: Sequence[nn.Parameter], config: OptimizerConfig, is_lean: bool) -> list[Rule]:
    every = dict(enumerate(parameters))
    if is_lean:
        return [KahanRule(every, config)]
    if config.name in LIBRARIES:
        return [LibraryRule(every, config)]
    matrices = {i: p for i, p in every.items() if config.name == "muon" and multiplies(p)}
    others = {i: p for i, p in every.items() if i not in matrices}
    return [AdamWRule(others, config), *([MuonRule(matrices, config)] if matrices else [])]
