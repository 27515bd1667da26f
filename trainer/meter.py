"""What is logged of training: sums stay on the device until a log point reads them, so that nobody waits for them."""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from trainer.batch import Batch


class Meter:
    """Means since the last reading, of steps of `samples` samples each."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._waited_s, self._began_s = 0.0, time.perf_counter()

    def wait(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; the time that takes counts as waiting for data."""
        began_s = time.perf_counter()
        batch = next(batches)
        self._waited_s += time.perf_counter() - began_s
        return batch

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Count one optimizer step with its loss and the norm of its gradients, scalars on the device."""
        self._losses.append(loss)
        self._norms.append(norm)

    def leave_out(self, seconds: float) -> None:
        """Take time that training did not use (evaluation, saving) out of the rates."""
        self._began_s += seconds

    def read(self, over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Mean loss and gradient norm, samples per second, share of the time spent waiting for data; then anew.

        The loss is that of all processes, by the mean that `over_processes` takes of it.
        """
        steps, elapsed_s = len(self._losses), time.perf_counter() - self._began_s
        values = {
            "loss": float(over_processes(torch.stack(self._losses).mean())),
            "grad_norm": float(torch.stack(self._norms).mean()),
            "samples_per_s": steps * self._samples / elapsed_s,
            "data_wait_share": self._waited_s / elapsed_s,
        }
        self._losses, self._norms = [], []
        self._waited_s, self._began_s = 0.0, time.perf_counter()
        return values
