"""A run's own eval loss: of its weights and their average, when there is time for it, into its log and its curves.

Evaluation may take a share of the run's time (eval.share). It is due every eval.every steps and with each checkpoint; a
turn is taken only if what it costs fits what the time since the start allows, and leaves room for one at the last step:

    spent + cost     <= share * elapsed
    spent + 2 * cost <= share * elapsed * steps to be done / steps done        (not at the last step)

cost is that of the turn before. The first is reckoned as a third of training as many samples: forward, and no backward.
So which turns are taken depends on time; what they measure does not, and training does not depend on either.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from shared.progress import say
from shared.store import StoreReader
from trainer.batch import Batch
from trainer.config import EvalConfig
from trainer.ema import Ema
from trainer.eval_loss import EvalLoss, eval_loss, holding
from trainer.eval_samples import PinnedSample, pin_samples, read_sample_batch
from trainer.loss import DenoisingLoss, Predict
from trainer.run import Run

FORWARD_SHARE = 1 / 3  # of a training step: the backward pass is twice the forward


@dataclass(frozen=True)
class Score:
    """What was measured after a step: of the weights, and of their average where one is kept."""

    raw: EvalLoss
    ema: EvalLoss | None
    took_s: float

    @property
    def best(self) -> float:
        """What checkpoints are ranked by: the loss of the weights that are drawn with."""
        return (self.ema or self.raw).loss

    def fields(self) -> dict[str, Any]:
        """For the log of events."""
        averaged = {"loss_ema": self.ema.loss, "bins_ema": [one.as_list() for one in self.ema.bins]} if self.ema else {}
        return {
            "loss": self.raw.loss,
            "bins": [one.as_list() for one in self.raw.bins],
            **averaged,
            "draws": self.raw.draws,
            "lost": self.raw.lost,
            "took_s": round(self.took_s, 3),
        }

    def curves(self) -> dict[str, float]:
        """For trackers: a curve of each loss, and of each stretch of timesteps."""
        named = {"eval_loss": self.raw} | ({"eval_loss_ema": self.ema} if self.ema else {})
        return {
            name: value
            for key, of in named.items()
            for name, value in [(key, of.loss), *((f"{key}/{one.name}", one.loss) for one in of.bins)]
        }


class Turns:
    """When evaluation is due, and whether there is time; all in seconds of `clock`."""

    def __init__(self, config: EvalConfig, steps: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._config, self._steps, self._clock = config, steps, clock
        self._began_s, self._spent_s = clock(), 0.0
        self._first_step: int | None = None
        self._cost_s: float | None = None

    def is_turn(self, done: int, is_saving: bool, samples_per_step: int, passes: int) -> bool:
        """Whether to evaluate after step `done`, `passes` times over all draws."""
        if self._first_step is None:
            self._first_step = done - 1
        if self._config.samples == 0 or not (is_saving or done % self._config.every == 0):
            return False
        if self._config.share == 1:
            return True
        elapsed_s, trained = self._clock() - self._began_s, done - self._first_step
        step_s = (elapsed_s - self._spent_s) / trained
        first_s = step_s / samples_per_step * self._config.samples * passes * FORWARD_SHARE
        cost_s = first_s if self._cost_s is None else self._cost_s
        fits = self._spent_s + cost_s <= self._config.share * elapsed_s
        if done == self._steps:
            return fits
        whole_s = elapsed_s / trained * (self._steps - self._first_step)
        return fits and self._spent_s + 2 * cost_s <= self._config.share * whole_s

    def took(self, seconds: float) -> None:
        """Count the time that a turn took."""
        self._cost_s = seconds
        self._spent_s += seconds


class HeldOut:
    """The eval loss of one run; `is_turn` says when, `measure` what."""

    def __init__(self, run: Run, store: StoreReader, loss: DenoisingLoss, device: torch.device) -> None:
        self._config, self._device, self._loss = run.config, device, loss
        self._samples = pin_samples(run.folder, run.manifest) if run.config.eval.samples else []
        self._read = partial(read_sample_batch, store, run.manifest.settings)
        self._turns = Turns(run.config.eval, run.config.steps)
        self._has_said_lost = False

    def is_turn(self, done: int, is_saving: bool) -> bool:
        """Whether it is time to measure after step `done`."""
        per_step = self._config.batch * self._config.accumulation
        passes = 2 if self._config.ema.decay else 1
        return bool(self._samples) and self._turns.is_turn(done, is_saving, per_step, passes)

    def measure(
        self, predict: Predict, unet: nn.Module, ema: Ema | None, is_asked: Callable[[], bool] = lambda: False
    ) -> Score | None:
        """The eval loss of the weights and of their average; both are as they were afterwards.

        None where it was broken off because the process `is_asked` to stop: saving comes first.
        """
        self._wait_for_device()
        began_s = time.perf_counter()
        unet.eval()
        try:
            raw = self._measure_once(predict, is_asked)
            averaged = None
            if ema is not None:
                with holding(unet, ema.state_dict()):
                    averaged = self._measure_once(predict, is_asked)
        except _BrokenOff:
            return None
        finally:
            unet.train()
        score = Score(raw, averaged, time.perf_counter() - began_s)
        self._turns.took(score.took_s)
        if raw.lost and not self._has_said_lost:
            self._has_said_lost = True
            say(f"{raw.lost} of {raw.draws} draws of the eval loss could not be read: cache-store verify says why")
        return score

    def _measure_once(self, predict: Predict, is_asked: Callable[[], bool]) -> EvalLoss:
        def read(samples: Sequence[PinnedSample]) -> tuple[Batch | None, list[int]]:
            if is_asked():
                raise _BrokenOff
            return self._read(samples)

        count, batch = self._config.eval.samples, self._config.batch
        return eval_loss(predict, self._loss, self._samples, read, count=count, batch=batch, device=self._device)

    def _wait_for_device(self) -> None:
        """Steps that are still under way are not evaluation's time."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


class _BrokenOff(Exception):
    """Somebody asked to stop while it was measured."""
