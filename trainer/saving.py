"""When a run is saved, and what becomes of it where there is no room: a warning, and training goes on.

The checkpoint before stays whole (trainer/checkpoint.py writes beside and renames). Where nothing comes after, because
the run is at its end or was asked to stop, the error is the run's.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.command import one_line
from shared.errors import StoreIO
from shared.progress import say
from shared.runlog import RunLog
from trainer.config import CheckpointConfig


class SaveTurns:
    """Every so many steps or so many minutes since the last time, whichever comes first."""

    def __init__(self, config: CheckpointConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._last_s = clock()

    def is_turn(self, done: int) -> bool:
        """Whether to save after step `done`; minutes count from the last turn."""
        late = self._clock() - self._last_s >= 60 * self._config.every_minutes
        if done % self._config.every and not late:
            return False
        self._last_s = self._clock()
        return True


@contextmanager
def surviving_a_full_disk(folder: Path, log: RunLog, step: int, *, is_last_chance: bool) -> Iterator[None]:
    """Let training go on where saving in here fails for want of room or of a sound disk; the next turn tries again."""
    try:
        yield
    except (OSError, StoreIO) as error:
        for left in (folder / "checkpoints").glob(".saving-*"):
            shutil.rmtree(left, ignore_errors=True)
        if is_last_chance:
            raise
        reason = one_line(str(error))
        say(f"WARNING: step {step} is not saved: {reason}. Earlier checkpoints are whole; training goes on")
        log.write("unsaved", step=step, why=reason)
