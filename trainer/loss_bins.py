"""Which loss at which timestep: means over stretches of 50 timesteps, summed where the losses are.

Training adds every sample here and reads at log points alone; evaluation of held-out samples uses the same stretches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.schedule import TimestepRange

AT_ONCE = 256  # micro-batches whose losses wait to be summed
BIN = 50  # timesteps; stretches begin at multiples of it, the first and the last are cut to the range


@dataclass(frozen=True)
class Bin:
    """Mean loss of `samples` samples whose timesteps lie in [low, high)."""

    low: int
    high: int
    loss: float
    samples: int

    def as_list(self) -> list[float]:
        """[low, high, loss, samples], as events have it: six digits tell two losses apart."""
        return [self.low, self.high, float(f"{self.loss:.6g}"), self.samples]

    @property
    def name(self) -> str:
        """For a curve of its own: "t0350-0399", in the order of timesteps when sorted."""
        return f"t{self.low:04d}-{self.high - 1:04d}"


class LossBins:
    """Sums of losses by timestep since the last reading, on one device; adding waits for nobody.

    What is added is summed many at a time: one by one it would be six small operations of each micro-batch.
    """

    def __init__(self, within: TimestepRange, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self._within, self._first = within, within.low // BIN
        count = (within.high - 1) // BIN - self._first + 1
        self._sums = torch.zeros(2, count, device=device, dtype=dtype)  # of losses, of samples
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, t: Tensor, losses: Tensor) -> None:
        """Count one loss for each of the timesteps, t int64 [B] and losses [B] on the device."""
        self._waiting.append((t, losses.detach()))
        if len(self._waiting) == AT_ONCE:
            self._sum_up()

    def take(self) -> Tensor:
        """The sums [2, bins], and zeros from here on; several processes add theirs up before they are read."""
        self._sum_up()
        sums = self._sums.clone()
        self._sums.zero_()
        return sums

    def _sum_up(self) -> None:
        if not self._waiting:
            return
        where = torch.cat([t for t, _ in self._waiting]) // BIN - self._first
        losses = torch.cat([losses for _, losses in self._waiting]).to(self._sums.dtype)
        self._sums[0].index_add_(0, where, losses)
        self._sums[1].index_add_(0, where, torch.ones_like(losses))
        self._waiting.clear()

    def read(self, sums: Tensor) -> list[Bin]:
        """Means of what `take` gave, lowest timesteps first; stretches without a sample are left out."""
        bins = []
        for index, (loss, samples) in enumerate(sums.T.tolist(), start=self._first):
            low, high = max(index * BIN, self._within.low), min((index + 1) * BIN, self._within.high)
            if samples:
                bins.append(Bin(low, high, loss / samples, int(samples)))
        return bins
