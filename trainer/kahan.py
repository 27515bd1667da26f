"""AdamW for bf16 weights: what rounding takes from a step is kept and added to the next (Kahan 1965).

At learning rate 4e-7 a step is a hundredth of the distance between neighbours in bf16: plain bf16 weights would never
move. torch-optimi's AdamW steps each weight beside its compensation; the dtypes of what is kept are chosen here:

    compensation        fp16: bf16 would lose 8 % of such steps in 1000 of them, fp16 nothing that can be measured
    exp_avg_sq          fp32: beta2 = 0.999 takes a thousandth off, and bf16 rounds that back on
    exp_avg             bf16: beta1 = 0.9 takes a tenth off

That is 12 bytes a parameter with weight and gradient, 10 where each weight is stepped as soon as the backward pass has
its gradient (optimizer.fused_backward). Then no gradient waits for others: there is no norm of all to clip by, nothing
accumulates, and a gradient that is not finite leaves out its own weight alone. Parameters of another dtype are stepped
in their own.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import ConfigError
from trainer.optimizer_config import OptimizerConfig


class KahanRule:
    """torch-optimi's AdamW, a weight at a time, so that a bad step is undone at the price of one weight's copy."""

    def __init__(self, parameters: Mapping[int, nn.Parameter], config: OptimizerConfig) -> None:
        if importlib.util.find_spec("optimi") is None:
            extra = "pip install 'sdxl-experts[lean]'"
            raise ConfigError(f"precision = 'bf16-lean' needs torch-optimi, which is not installed: {extra}")
        self._parameters, self._config = parameters, config
        self._group: dict[str, Any] = {"lr": config.learning_rate}
        self._state = {place: _begin(parameter) for place, parameter in parameters.items()}
        self._norms: list[Tensor] = []
        if config.fused_backward:
            for place, parameter in parameters.items():
                hooked: Any = parameter
                hooked.register_post_accumulate_grad_hook(partial(self._step_at_once, place))
        self._done = 0  # steps, bad ones too: bias correction asks for their number on the host

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """One, of the rate alone."""
        return [self._group]

    def step(self, is_bad: Tensor) -> None:
        """One step, or none where `is_bad` is 1; those that are fused into the backward pass were taken there."""
        for place, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._step_unless(is_bad, place)
        self._done += 1

    @torch.no_grad()
    def _step_unless(self, is_bad: Tensor, place: int) -> None:
        parameter = self._parameters[place]
        assert parameter.grad is not None
        tensors = [parameter.detach(), *self._state[place].values()]
        before = [tensor.clone() for tensor in tensors]
        self._step_one(parameter.detach(), parameter.grad, self._state[place])
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(torch.where(is_bad > 0, old, tensor))

    def _step_at_once(self, place: int, parameter: Tensor) -> None:
        """Step a weight as soon as its gradient is there, unless that is not finite, and let go of the gradient."""
        assert parameter.grad is not None
        norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        self._norms.append(norm)
        self._step_unless((~torch.isfinite(norm)).float(), place)
        parameter.grad = None

    def fused_norm(self) -> Tensor | None:
        """Norm of all gradients of the backward pass that stepped; None where steps are not fused into it."""
        if not self._config.fused_backward:
            return None
        norms, self._norms = self._norms, []
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    def _step_one(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
        from optimi.adamw import adamw

        rate, config = float(self._group["lr"]), self._config
        compensation = state.get("kahan_comp")
        # Decay is far below what bf16 weights can show, so it goes by way of the compensation too.
        (weight if compensation is None else compensation).add_(weight, alpha=-rate * config.weight_decay)
        adamw(
            [weight],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [compensation],
            lr=rate,
            beta1=config.beta1,
            beta2=config.beta2,
            weight_decay=0.0,
            eps=config.eps,
            step=torch.tensor(self._done, dtype=torch.int32),
            kahan_sum=compensation is not None,
        )

    def weights(self) -> Iterator[Tensor]:
        """Weights with what rounding took from them, in fp32, made one at a time."""
        for place, state in self._state.items():
            weight = self._parameters[place].detach().float()
            yield weight + state["kahan_comp"] if "kahan_comp" in state else weight

    def tensors(self) -> dict[str, Tensor]:
        """Moments and compensation of each parameter, and the count of steps."""
        named = {f"{place}.{name}": t for place, state in self._state.items() for name, t in state.items()}
        return named | {"all.step": torch.tensor(self._done)}

    def wanted(self) -> set[str]:
        """What `tensors` names."""
        return set(self.tensors())

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a state."""
        self._done = int(tensors["all.step"])
        for place, state in self._state.items():
            for name, tensor in state.items():
                tensor.copy_(tensors[f"{place}.{name}"])


def _begin(parameter: nn.Parameter) -> dict[str, Tensor]:
    state = {
        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False),
    }
    if parameter.dtype == torch.bfloat16:
        state["kahan_comp"] = torch.zeros_like(parameter, dtype=torch.float16, requires_grad=False)
    return state
