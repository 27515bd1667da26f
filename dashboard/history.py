"""What the events of one run come to: curves over the steps, losses by timestep, and what is worth telling.

Tail -> History.add -> thinned curves. A hundred thousand log points are kept as plain columns; what is drawn of them is
at most COLUMNS points, each with the mean, the lowest and the highest of what it stands for.
"""

from array import array
from bisect import bisect_right
from collections import deque
from typing import Any

import numpy as np

from dashboard.tail import Event, number

COLUMNS = 240  # points of a curve that is drawn
RECENT = 100  # log points that the losses by timestep are the means of
KEPT_EVENTS = 200
RATE_POINTS = 40  # log points that the speed of now is taken over

Numbers = np.ndarray[Any, np.dtype[np.float64]]
Bin = tuple[int, int, float]  # first timestep, first beyond, mean loss


class History:
    """One run, as far as its events were read."""

    def __init__(self) -> None:
        self._columns = {name: array("d") for name in ("step", "time_s", "loss", "learning_rate", "steps_per_s")}
        self._evals = {name: array("d") for name in ("step", "loss", "loss_ema")}
        self._recent: deque[Any] = deque(maxlen=RECENT)
        self._eval_bins: Any = None
        self._last: tuple[float, float] | None = None
        self.told: deque[Event] = deque(maxlen=KEPT_EVENTS)
        self.ended = ""  # "complete" or "stopped", where the last word was that
        self.latest: Event = {}
        self.began_s: float | None = None

    def add(self, event: Event) -> None:
        """Take in one event; fields that are missing or no numbers are left out."""
        kind = event["event"]
        if kind == "step":
            self._add_step(event)
            return
        if kind == "eval":
            self._add_eval(event)
        if kind in ("begin", "resume"):
            self._go_back(number(event.get("step")) or 0.0)
            self.began_s = number(event.get("time_s"))
        self.ended = kind if kind in ("complete", "stopped") else ""
        self.told.append(event)

    def _add_step(self, event: Event) -> None:
        step, time_s = number(event.get("step")), number(event.get("time_s"))
        if step is None or time_s is None or (self._columns["step"] and step <= self._columns["step"][-1]):
            return
        rate = None
        if self._last is not None and time_s > self._last[1]:
            rate = (step - self._last[0]) / (time_s - self._last[1])
        values = {"step": step, "time_s": time_s, "steps_per_s": rate}
        values |= {name: number(event.get(name)) for name in ("loss", "learning_rate")}
        for name, column in self._columns.items():
            value = values[name]
            column.append(float("nan") if value is None else value)
        self._last, self.latest, self.ended = (step, time_s), event, ""
        self._recent.append(event.get("bins"))

    def _add_eval(self, event: Event) -> None:
        step = number(event.get("step"))
        if step is None:
            return
        for name, column in self._evals.items():
            value = step if name == "step" else number(event.get(name))
            column.append(float("nan") if value is None else value)
        self._eval_bins = event.get("bins_ema") or event.get("bins")

    def _go_back(self, step: float) -> None:
        """A run that goes on from a checkpoint has not taken the steps that were logged after it."""
        for columns in (self._columns, self._evals):
            keep = bisect_right(columns["step"], step)
            for column in columns.values():
                del column[keep:]
        self._last = None

    @property
    def points(self) -> int:
        """Log points there are."""
        return len(self._columns["step"])

    def step(self) -> int:
        """The last step that was logged, 0 before the first."""
        return int(self._columns["step"][-1]) if self.points else 0

    def steps_per_s(self) -> float | None:
        """Speed over the last log points since the run was begun or resumed; None where it cannot be told."""
        steps, times = (list(self._columns[name][-RATE_POINTS:]) for name in ("step", "time_s"))
        since = [i for i, time_s in enumerate(times) if self.began_s is None or time_s >= self.began_s]
        if len(since) < 2 or times[since[-1]] <= times[since[0]]:
            return None
        return (steps[since[-1]] - steps[since[0]]) / (times[since[-1]] - times[since[0]])

    def curves(self) -> dict[str, list[float | None]]:
        """Mean, lowest and highest loss, learning rate and steps/s over the steps, in at most COLUMNS points."""
        steps = np.array(self._columns["step"])
        starts = column_starts(steps)
        if not len(starts):
            return {}
        ends = np.append(starts[1:], len(steps)) - 1
        loss = np.array(self._columns["loss"])
        drawn = {
            "step": steps[ends],
            "loss": _means(loss, starts),
            "loss_low": np.fmin.reduceat(loss, starts),
            "loss_high": np.fmax.reduceat(loss, starts),
            "learning_rate": np.array(self._columns["learning_rate"])[ends],
            "steps_per_s": _means(np.array(self._columns["steps_per_s"]), starts),
        }
        return {name: short(values) for name, values in drawn.items()}

    def evals(self) -> dict[str, list[float | None]]:
        """The held-out loss over the steps: of the average where one is kept, else of the weights."""
        steps, loss, ema = (np.array(column) for column in self._evals.values())
        starts = column_starts(steps)
        if not len(starts):
            return {}
        ends = np.append(starts[1:], len(steps)) - 1
        return {"step": short(steps[ends]), "loss": short(np.where(np.isnan(ema), loss, ema)[ends])}

    def bins(self) -> list[Bin]:
        """Mean training loss by stretch of timesteps over the last log points, each sample alike."""
        sums: dict[tuple[int, int], tuple[float, float]] = {}
        for bins in self._recent:
            for low, high, loss, samples in _bins(bins):
                before = sums.get((low, high), (0.0, 0.0))
                sums[low, high] = (before[0] + loss * samples, before[1] + samples)
        return [(low, high, _short(total / n)) for (low, high), (total, n) in sorted(sums.items()) if n]

    def eval_bins(self) -> list[Bin]:
        """The newest held-out loss by stretch of timesteps."""
        return [(low, high, _short(loss)) for low, high, loss, _ in _bins(self._eval_bins)]


def column_starts(steps: Numbers) -> np.ndarray[Any, np.dtype[np.int64]]:
    """First index of each point that is drawn: every one, or those that begin one of COLUMNS equal stretches."""
    if len(steps) <= COLUMNS:
        return np.arange(len(steps))
    edges = np.linspace(steps[0], steps[-1], COLUMNS + 1)[:-1]
    return np.unique(np.searchsorted(steps, edges)).astype(np.int64)


def _means(values: Numbers, starts: np.ndarray[Any, np.dtype[np.int64]]) -> Numbers:
    known = ~np.isnan(values)
    sums = np.add.reduceat(np.where(known, values, 0.0), starts)
    counts = np.add.reduceat(known.astype(np.float64), starts)
    means: Numbers = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return means


def short(values: Numbers) -> list[float | None]:
    """Six digits of each, None for what is no number: what JSON carries."""
    return [None if value != value else _short(value) for value in values.tolist()]


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _bins(bins: Any) -> list[tuple[int, int, float, float]]:
    found = []
    for row in bins if isinstance(bins, list) else []:
        numbers = [number(value) for value in row] if isinstance(row, list) and len(row) == 4 else []
        if len(numbers) == 4 and None not in numbers:
            low, high, loss, samples = (value or 0.0 for value in numbers)
            found.append((int(low), int(high), loss, samples))
    return found
