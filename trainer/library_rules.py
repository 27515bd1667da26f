"""Optimizers of other libraries: bitsandbytes' 8-bit AdamW, transformers' Adafactor, schedulefree's AdamW.

None of them can skip a step on the device. So each steps a chunk of the parameters at a time, and what the chunk was
before is put back where the step was bad; its count of steps goes on. Their state leaves as tensors with names.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import ConfigError
from trainer.optimizer_config import OptimizerConfig
from trainer.torch_rules import as_matrix

CHUNK = 1 << 25  # elements whose copies wait at a time, in case the step is bad
EIGHT_BIT_SMALLEST = 4096  # bitsandbytes keeps the moments of smaller tensors in fp32


@dataclass(frozen=True)
class Library:
    """How one library's optimizer is driven."""

    package: str  # what must be installed
    make: Callable[[Sequence[Tensor], OptimizerConfig], Any]
    items: Callable[[Tensor], tuple[str, ...]]  # what it keeps of a weight, by name
    view: Callable[[Tensor], Tensor]  # how it sees a weight
    step: Callable[[Any], None]
    constants: Callable[[Any, Tensor], dict[str, Any]]  # what it keeps of a weight that is the same in every run
    shared: tuple[str, ...] = ()  # numbers of a group that go on with the run
    is_average: bool = False  # the weights to evaluate are not those that are trained


class LibraryRule:
    """A library's optimizer over chunks of the parameters."""

    def __init__(self, parameters: Mapping[int, nn.Parameter], config: OptimizerConfig) -> None:
        self._library, self._beta1 = LIBRARIES[config.name], config.beta1
        _require(self._library.package, config.name, next(iter(parameters.values())).device)
        self._parameters = parameters
        self._views = {place: self._library.view(parameter.detach()) for place, parameter in parameters.items()}
        chunks = list(_chunks(self._views))
        self._chunks = [(self._library.make([self._views[i] for i in places], config), places) for places in chunks]

    @property
    def is_average(self) -> bool:
        """Whether `weights` differ from what is trained."""
        return self._library.is_average

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The library's, of every chunk."""
        return [group for optimizer, _ in self._chunks for group in optimizer.param_groups]

    @torch.no_grad()
    def step(self, is_bad: Tensor) -> None:
        """A step of each chunk, undone where `is_bad` is 1."""
        for optimizer, places in self._chunks:
            before: dict[int, dict[str, Tensor]] = {}
            for place in places:
                view, gradient = self._views[place], self._parameters[place].grad
                if gradient is not None:
                    view.grad = self._library.view(_laid_out_as(self._parameters[place], gradient))
                before[place] = {name: tensor.clone() for name, tensor in self._kept(optimizer, place).items()}
            self._library.step(optimizer)
            for place in places:
                self._views[place].grad = None
                for name, tensor in self._kept(optimizer, place).items():
                    tensor.copy_(torch.where(is_bad > 0, _old(before[place], name, tensor), tensor))

    def _kept(self, optimizer: Any, place: int) -> dict[str, Tensor]:
        """A weight, named "weight", and the tensors that are kept of it."""
        state = optimizer.state.get(self._views[place], {})
        kept = {name: state[name] for name in self._library.items(self._views[place]) if name in state}
        return {"weight": self._views[place]} | {n: t for n, t in kept.items() if isinstance(t, Tensor)}

    def weights(self) -> Iterator[Tensor] | None:
        """The average x of what is trained, y = (1 - beta1) z + beta1 x (Defazio et al. 2024, arXiv:2405.15682)."""
        return self._averages() if self.is_average else None

    def _averages(self) -> Iterator[Tensor]:
        for optimizer, places in self._chunks:
            for place in places:
                view = self._views[place]
                z = optimizer.state.get(view, {}).get("z", view)
                yield self._shaped(place, torch.lerp(view, z, 1 - 1 / self._beta1))

    def _shaped(self, place: int, flat: Tensor) -> Tensor:
        """A flat tensor, in the order of the weight in memory, in the weight's shape."""
        shaped = torch.empty_like(self._parameters[place])
        self._library.view(shaped.detach()).copy_(flat)
        return shaped

    def tensors(self) -> dict[str, Tensor]:
        """What is kept of each weight, and the numbers of the group; trained weights too, where averages are saved."""
        named: dict[str, Tensor] = {}
        for optimizer, places in self._chunks:
            for place in places:
                entry = optimizer.state.get(self._views[place], {})
                items = [name for name in self._library.items(self._views[place]) if name in entry]
                named |= {f"{place}.{name}": torch.as_tensor(entry[name]) for name in items}
                if self.is_average and items:
                    named[f"{place}.trained"] = self._views[place].clone()  # averages take its place while saving
        group = self.param_groups[0]
        shared = {name: torch.tensor(float(group[name]), dtype=torch.float64) for name in self._library.shared}
        return named | {f"all.{name}": tensor for name, tensor in shared.items()}

    def wanted(self) -> set[str]:
        """What `tensors` names once there has been a step."""
        extra = ("trained",) if self.is_average else ()
        own = {f"{place}.{name}" for place, v in self._views.items() for name in (*self._library.items(v), *extra)}
        return own | {f"all.{name}" for name in self._library.shared}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a state, and trained weights where averages were saved in their place."""
        for optimizer, places in self._chunks:
            for place in places:
                view = self._views[place]
                named = {name: tensors[f"{place}.{name}"] for name in self._library.items(view)}
                entry = {name: _as_kept(name, tensor, view) for name, tensor in named.items()}
                optimizer.state[view] = entry | self._library.constants(optimizer, view)
                if self.is_average:
                    view.copy_(tensors[f"{place}.trained"])
            for group in optimizer.param_groups:
                group |= {name: type(group[name])(tensors[f"all.{name}"].item()) for name in self._library.shared}


def _laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the weight's own order in memory, which autograd keeps as a rule."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _chunks(views: Mapping[int, Tensor]) -> Iterator[list[int]]:
    """Places in order, as many at a time as hold CHUNK elements, and one at least."""
    chunk: list[int] = []
    elements = 0
    for place, view in views.items():
        if chunk and elements + view.numel() > CHUNK:
            yield chunk
            chunk, elements = [], 0
        chunk.append(place)
        elements += view.numel()
    if chunk:
        yield chunk


def _old(before: dict[str, Tensor], name: str, now: Tensor) -> Tensor:
    """What a tensor was before the step; where it was not there yet, what it begins as."""
    if name in before:
        return before[name]
    return before["weight"] if name == "z" else torch.zeros_like(now)


def _as_kept(name: str, tensor: Tensor, view: Tensor) -> Any:
    """A saved item as the libraries keep it: a count on the host, anything else beside the weight."""
    return int(tensor) if name == "step" else tensor.to(view.device, copy=True)


def _require(package: str, name: str, device: torch.device) -> None:
    if importlib.util.find_spec(package) is None:
        extra = f"pip install 'sdxl-experts[{name}]'"
        raise ConfigError(f"optimizer.name = {name!r} needs {package}, which is not installed: {extra}")
    if package == "bitsandbytes" and device.type not in ("cuda", "cpu"):
        raise ConfigError(f"optimizer.name = {name!r} runs on cuda and cpu, not on {device.type}: choose 'adafactor'")


def _flat(tensor: Tensor) -> Tensor:
    return tensor.view(1) if tensor.ndim == 0 else as_matrix(tensor).view(-1)


def _matrix(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim < 2 else as_matrix(tensor)


def _make_eight_bit(views: Sequence[Tensor], config: OptimizerConfig) -> Any:
    from bitsandbytes.optim import AdamW8bit

    betas = (config.beta1, config.beta2)
    return AdamW8bit(views, config.learning_rate, betas, config.eps, config.weight_decay)


def _step_eight_bit(optimizer: Any) -> None:
    """As `optimizer.step()`, which waits for the GPU after every tensor."""
    for group_index, group in enumerate(optimizer.param_groups):
        for index, weight in enumerate(group["params"]):
            if weight.grad is not None:
                if not optimizer.state[weight]:
                    optimizer.init_state(group, weight, group_index, index)
                optimizer.update_step(group, weight, group_index, index)


def _eight_bit_items(view: Tensor) -> tuple[str, ...]:
    blocks = ("absmax1", "absmax2") if view.numel() >= EIGHT_BIT_SMALLEST else ()
    return ("step", "state1", "state2", *blocks)


def _eight_bit_tables(optimizer: Any, view: Tensor) -> dict[str, Any]:
    if view.numel() < EIGHT_BIT_SMALLEST:
        return {}
    tables = optimizer.name2qmap
    return {"qmap1": tables["dynamic"].to(view.device), "qmap2": tables["udynamic"].to(view.device)}


def _make_adafactor(views: Sequence[Tensor], config: OptimizerConfig) -> Any:
    """With the configured rate: its own would ask the host for the size of each weight."""
    from transformers.optimization import Adafactor

    own = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    return Adafactor(views, lr=config.learning_rate, weight_decay=config.weight_decay, **own)


def _make_schedule_free(views: Sequence[Tensor], config: OptimizerConfig) -> Any:
    from schedulefree import AdamWScheduleFree

    betas, decay = (config.beta1, config.beta2), config.weight_decay
    optimizer = AdamWScheduleFree(views, config.learning_rate, betas, config.eps, decay)
    optimizer.train()
    return optimizer


def _no_constants(optimizer: Any, view: Tensor) -> dict[str, Any]:
    return {}


LIBRARIES = {
    "adamw-8bit": Library(
        package="bitsandbytes",
        make=_make_eight_bit,
        items=_eight_bit_items,
        view=_flat,
        step=_step_eight_bit,
        constants=_eight_bit_tables,
    ),
    "adafactor": Library(
        package="transformers",
        make=_make_adafactor,
        items=lambda v: ("step", "exp_avg_sq_row", "exp_avg_sq_col") if v.ndim > 1 else ("step", "exp_avg_sq"),
        view=_matrix,
        step=lambda optimizer: optimizer.step(),
        constants=lambda optimizer, view: {"RMS": 0},  # written before it is read
    ),
    "schedule-free": Library(
        package="schedulefree",
        make=_make_schedule_free,
        items=lambda v: ("z", "exp_avg_sq"),
        view=_flat,
        step=lambda optimizer: optimizer.step(),
        constants=_no_constants,
        shared=("k", "weight_sum", "lr_max"),
        is_average=True,
    ),
}
