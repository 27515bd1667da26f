"""Fewer at once where the device has no room for a batch: half of it, and half of that, remembered for its size."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from shared.device import free_unused_memory, is_out_of_memory
from shared.errors import ConfigError
from shared.progress import say

T = TypeVar("T")
R = TypeVar("R")


class Halving:
    """Runs work on batches, in pieces that fit; `way_out` ends the message where not even one of something fits."""

    def __init__(self, device: str, way_out: str) -> None:
        self._device, self._way_out = device, way_out
        self._most: dict[str, int] = {}

    def run(self, what: str, items: Sequence[T], work: Callable[[Sequence[T]], list[R]]) -> list[R]:
        """work(items), or what it gives for their pieces; `what` names things of one size, as "pictures of 8 x 8 px".

        Raises ConfigError where one of them alone does not fit.
        """
        made: list[R] = []
        start = 0
        while start < len(items):
            piece = items[start : start + self._most.get(what, len(items))]
            try:
                made += work(piece)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                start += len(piece)
                continue
            self._halve(what, len(piece))  # here, where nothing of the failed try is alive any more
        return made

    def _halve(self, what: str, count: int) -> None:
        free_unused_memory()
        if count == 1:
            raise ConfigError(f"--device {self._device} has no memory for one of the {what}: {self._way_out}")
        self._most[what] = count // 2
        say(f"out of memory with {count} {what} on {self._device}: {count // 2} at once from here on")
