"""Curves for people, through accelerate's trackers; a run does not depend on them."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.progress import say


class Curves:
    """TensorBoard curves in RUN/tensorboard, or nothing where it is switched off or not installed."""

    def __init__(self, folder: Path, first_step: int, *, enabled: bool) -> None:
        self._tracker: Any = None
        if not enabled:
            return
        if importlib.util.find_spec("tensorboard") is None:
            say("no curves: tensorboard is not installed (pip install 'sdxl-experts[tensorboard]')")
            return
        from accelerate import PartialState
        from accelerate.tracking import TensorBoardTracker

        PartialState()
        # What a killed process wrote past its last checkpoint is purged: those steps come again.
        self._tracker = TensorBoardTracker("tensorboard", folder, purge_step=first_step + 1)
        self._tracker.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add one point to each curve."""
        if self._tracker is not None:
            self._tracker.log(dict(values), step=step)

    def close(self) -> None:
        """Write out what is left."""
        if self._tracker is not None:
            self._tracker.finish()
