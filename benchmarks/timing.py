"""Rates of several ways to do one thing, taken in turns, so that a busy machine slows all of them alike."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

ROUND_S = 0.25  # each way runs at least this long in each round


@dataclass(frozen=True)
class Rate:
    """What one way reached: things per second, in the median round and in the best."""

    median: float
    best: float


def take_turns(ways: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, Rate]:
    """Call each way again and again, round after round, and return its rates; a call returns how many things it did.

    The first round is not counted: it fills caches.
    """
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            rate = _one_round(way)
            if number:
                rates[name].append(rate)
    return {name: Rate(median(reached), max(reached)) for name, reached in rates.items()}


def _one_round(way: Callable[[], int]) -> float:
    done, began = 0, time.perf_counter()
    while True:
        done += way()
        elapsed = time.perf_counter() - began
        if elapsed >= ROUND_S:
            return done / elapsed
