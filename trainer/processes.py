"""Several processes that train one expert together: torch's DDP, begun by `torchrun` or `accelerate launch`.

    one run for all -> each takes its share of every optimizer step -> gradients are averaged -> all step alike

The first process alone holds the run folder, writes and speaks; the others do as it says. Without a launcher there is
one process and nothing of this: no group, no message. The door to accelerate's process state.
"""

import contextlib
import json
import os
import time
import traceback
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from shared.device import choose_device
from shared.errors import ConfigError, ExpertsError, Stopped
from shared.progress import say

PATIENCE = timedelta(minutes=30)  # the others wait so long while the first saves a checkpoint
REST_S = 10.0  # the most that a thread of gloo may take to let go of what it has sent
LOST = "another process of this run ended: its own line says why; the same command goes on"


@dataclass(frozen=True)
class Processes:
    """This process among those that train one expert together."""

    index: int
    count: int
    device: torch.device
    group: Any = None  # for messages between hosts, over gloo; None where there is one process
    _sent: list["weakref.ref[Tensor]"] = field(default_factory=list)

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.index == 0

    def wrap(self, unet: nn.Module) -> nn.Module:
        """What to call in place of `unet`, so that its gradients become the mean over all processes."""
        if self.count == 1:
            return unet
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(unet, device_ids=devices, gradient_as_bucket_view=True)

    def averaging(self, model: nn.Module, now: bool) -> AbstractContextManager[None]:
        """Around a forward and a backward pass: average gradients in it, or gather them for a later one."""
        return nullcontext() if now or self.count == 1 else model.no_sync()  # type: ignore[operator]

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.count == 1:
            return values
        total = self._noted(values.detach().clone())
        distributed.all_reduce(total)
        return total

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        return self.total(values) / self.count

    def any(self, flag: bool) -> bool:
        """Whether any process says so; all of them learn it."""
        return bool(self.most(float(flag))[0])

    def most(self, *values: float) -> list[float]:
        """The largest of each value over all processes, by a message between hosts, which no device waits for."""
        if self.count == 1:
            return list(values)
        said = self._noted(torch.tensor(values, dtype=torch.float64))
        distributed.all_reduce(said, op=distributed.ReduceOp.MAX, group=self.group)
        most: list[float] = said.tolist()
        return most

    def tell(self, message: dict[str, Any] | None = None) -> dict[str, Any]:
        """What the first process says to all, as JSON; the others leave `message` out."""
        data = json.dumps(message).encode()
        size = self._noted(torch.tensor([len(data)]))
        distributed.broadcast(size, 0, group=self.group)
        padded = torch.frombuffer(bytearray(data.ljust(int(size))), dtype=torch.uint8)
        content = self._noted(padded[: int(size)].clone())
        distributed.broadcast(content, 0, group=self.group)
        told: dict[str, Any] = json.loads(bytes(content.tolist()))
        return told

    def rest(self) -> None:
        """Return once no thread of gloo holds a message any more; call it before the groups are let go of.

        Such a thread lets go of a tensor under Python's lock, some time after the message has come. The end of a group
        waits for its threads and does not give up that lock: both would wait for ever.
        """
        deadline_s = time.monotonic() + REST_S
        while self._held() and time.monotonic() < deadline_s:
            time.sleep(0.001)

    def _noted(self, message: Tensor) -> Tensor:
        self._sent[:] = [*self._held(), weakref.ref(message)]
        return message

    def _held(self) -> list["weakref.ref[Tensor]"]:
        return [each for each in self._sent if each() is not None]


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes of the launcher that began this one, or this one alone; `device` is the setting.

    Every error of another than the first names the process.
    """
    if _asked_for() == 1:
        if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "WORLD_SIZE" not in os.environ:
            say("accelerate launch --cpu begins one process, whatever --num_processes says: torchrun begins several")
        yield Processes(0, 1, choose_device(device))
        return
    processes = _join(device)
    try:
        with nullcontext() if processes.is_first else _silence():
            yield processes
    except ExpertsError as error:
        if processes.is_first:
            raise
        raise type(error)(f"process {processes.index}: {error}") from None
    except RuntimeError as error:
        if not _is_loss_of_another(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold messages
        raise Stopped(LOST if processes.is_first else f"process {processes.index}: {LOST}") from error
    finally:
        processes.rest()
        with contextlib.suppress(RuntimeError):
            distributed.destroy_process_group()


@contextmanager
def _silence() -> Iterator[None]:
    """What is said of the run, the first process says; errors are told after this."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def _asked_for() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _join(device: str) -> Processes:
    from accelerate import PartialState

    if ":" in device:
        raise ConfigError(f"--device {device}: several processes take a device each; name its kind alone, or auto")
    chosen = choose_device(device)
    if chosen.type == "mps":
        raise ConfigError("--device mps is one device: several processes need cuda or cpu")
    state = PartialState(cpu=chosen.type == "cpu", timeout=PATIENCE)
    group = distributed.new_group(backend="gloo", timeout=PATIENCE)
    return Processes(state.process_index, state.num_processes, state.device, group)


def _is_loss_of_another(error: RuntimeError) -> bool:
    """Whether torch says that a message found no other end; gloo throws what has no class of its own."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error)
