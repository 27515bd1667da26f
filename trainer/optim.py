"""AdamW, and its state as tensors with names: what a checkpoint can hold without pickle."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import CheckpointError
from trainer.config import OptimizerConfig


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW, which can skip a step on the device (found_inf) without asking the host."""
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def step_unless_bad(optimizer: torch.optim.AdamW, is_bad: Tensor) -> None:
    """One optimizer step, or none where `is_bad` (a scalar, 0.0 or 1.0, on the weights' device) is 1."""
    scaled: Any = optimizer  # these attributes are the protocol that torch.amp.GradScaler speaks
    scaled.grad_scale = None
    scaled.found_inf = is_bad
    optimizer.step()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Tensors of the state as {"<index>.<name>": tensor}; indices count the parameters in order."""
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {f"{index}.{name}": tensor for index, entry in state.items() for name, tensor in entry.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Take the state over; hyperparameters stay as configured. Raises CheckpointError where an item is missing."""
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    complete = all(set(state.get(index, ())) == {"step", "exp_avg", "exp_avg_sq"} for index in range(count))
    if not complete or len(state) != count:
        raise CheckpointError(f"the optimizer state is not that of {count} parameters under AdamW")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
