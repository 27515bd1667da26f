"""Exponential moving average of the weights that are trained, in fp32 beside the model or in the host's memory.

Beside a model on the GPU, an average on the host takes none of its memory: weights are copied into pinned memory in the
GPU's own order of work, nobody waiting for it, and a thread averages them while the next step is computed.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import CheckpointError


class Ema:
    """shadow <- d shadow + (1 - d) weights after each step, d = min(decay, (1 + n) / (10 + n)) while n is small."""

    def __init__(
        self,
        model: nn.Module,
        decay: float,
        updates: int = 0,
        device: torch.device | None = None,
        in_background: bool | None = None,
    ) -> None:
        self.decay, self.updates = decay, updates
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._names, self._weights = list(trained), list(trained.values())
        self._is_fp32 = all(weight.dtype == torch.float32 for weight in self._weights)
        self._shadow = [weight.detach().clone().to(device or weight.device).float() for weight in self._weights]
        is_elsewhere = any(s.device != w.device for s, w in zip(self._shadow, self._weights, strict=True))
        self._copies = _Copies(self._shadow) if (is_elsewhere if in_background is None else in_background) else None

    @torch.no_grad()
    def update(self, weights: Iterable[Tensor] | None = None) -> None:
        """Take in the model's weights as they are now, or those that an optimizer gives in their place."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        now = self._weights if weights is None else weights
        if self._copies is not None:
            self._copies.take_in(now, 1 - decay)
        elif isinstance(now, list) and self._is_fp32:
            torch._foreach_lerp_(self._shadow, now, 1 - decay)
        else:  # one at a time: they may be made for this alone
            for shadow, weight in zip(self._shadow, now, strict=True):
                shadow.lerp_(weight.float(), 1 - decay)
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights by the model's names, without those that are frozen."""
        self._settle()
        return dict(zip(self._names, self._shadow, strict=True))

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over averaged weights; raises CheckpointError where one is missing or of another shape."""
        self._settle()
        for name, shadow in zip(self._names, self._shadow, strict=True):
            if name not in state or state[name].shape != shadow.shape:
                raise CheckpointError(f"the averaged weights hold no {name} of shape {tuple(shadow.shape)}")
            shadow.copy_(state[name])

    def _settle(self) -> None:
        if self._copies is not None:
            self._copies.settle()


class _Copies:
    """Copies of the weights on the host, and the thread that averages them into `shadow`."""

    def __init__(self, shadow: list[Tensor]) -> None:
        pin = torch.cuda.is_available()
        self._shadow = shadow
        self._copies = [torch.empty_like(tensor, pin_memory=pin) for tensor in shadow]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ema")
        self._running: Future[None] | None = None

    def take_in(self, weights: Iterable[Tensor], share: float) -> None:
        """Copy `weights` and let the thread move the average to them by `share`."""
        self.settle()  # the copies are still being read where a step is shorter than its averaging
        copied: Any = None
        for copy, weight in zip(self._copies, weights, strict=True):
            copy.copy_(weight, non_blocking=True)
            copied = torch.cuda.current_stream(weight.device) if weight.is_cuda else None
        if copied is not None:
            copied = copied.record_event()
        self._running = self._thread.submit(self._average, copied, share)

    def settle(self) -> None:
        """Wait until the average is up to date; what went wrong in the thread is raised here."""
        if self._running is not None:
            self._running.result()
            self._running = None

    @torch.no_grad()
    def _average(self, copied: Any, share: float) -> None:
        if copied is not None:
            copied.synchronize()
        for shadow, copy in zip(self._shadow, self._copies, strict=True):
            shadow.lerp_(copy, share)
