"""Curves for people, through accelerate's trackers; a run does not depend on them.

    tensorboard     RUN/tensorboard
    wandb           one W&B run for a run folder, gone on with; offline with WANDB_MODE=offline, then in RUN/wandb
    trackio         the same in trackio

A tracker that cannot begin is named with the way out, one that fails later is left out; training goes on.
"""

import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from shared.atomic import write_atomically
from shared.errors import ConfigError
from shared.progress import say


def require_known(names: Iterable[str]) -> None:
    """Raise ConfigError where a tracker is asked for that there is not."""
    for name in names:
        if name not in _BEGIN:
            raise ConfigError(f"--tracker {name}: known are {', '.join(_BEGIN)}")


class Curves:
    """All trackers that were asked for and are installed."""

    def __init__(
        self, folder: Path, first_step: int, names: tuple[str, ...], project: str, settings: Mapping[str, Any]
    ) -> None:
        self._trackers: dict[str, Any] = {}
        for name in names:
            if importlib.util.find_spec(name) is None:
                say(f"no curves in {name}: it is not installed (pip install 'sdxl-experts[{name}]')")
                continue
            made = _try(name, partial(_BEGIN[name], folder, first_step, project, settings))
            if made is not None:
                self._trackers[name] = made

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add one point to each curve."""
        for name, tracker in list(self._trackers.items()):
            if not _try(name, partial(_log, tracker, values, step)):
                del self._trackers[name]

    def close(self) -> None:
        """Write out what is left."""
        for name, tracker in self._trackers.items():
            _try(name, tracker.finish)


def _try(name: str, act: Callable[[], Any]) -> Any:
    """What `act` gives, or None where it failed, which is said."""
    try:
        return act()
    except Exception as error:  # noqa: BLE001 -- other people's code over a network: days of training must outlive it
        say(f"no more curves in {name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        return None


def _log(tracker: Any, values: Mapping[str, float], step: int) -> bool:
    tracker.log(dict(values), step=step)
    return True


def _begin_tensorboard(folder: Path, first_step: int, project: str, settings: Mapping[str, Any]) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker

    PartialState()
    # What a killed process wrote past its last checkpoint is purged: those steps come again.
    tracker = TensorBoardTracker("tensorboard", folder, purge_step=first_step + 1)
    tracker.start()
    return tracker


def _begin_wandb(folder: Path, first_step: int, project: str, settings: Mapping[str, Any]) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import WandBTracker

    PartialState()
    where = {"dir": str(folder), "name": folder.name, "id": _run_id(folder), "resume": "allow"}
    tracker = WandBTracker(project, **where)
    tracker.start()
    tracker.store_init_configuration(dict(settings))
    return tracker


def _begin_trackio(folder: Path, first_step: int, project: str, settings: Mapping[str, Any]) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import TrackioTracker

    PartialState()
    tracker = TrackioTracker(project, name=f"{folder.name}-{_run_id(folder)}", resume="allow", config=dict(settings))
    tracker.start()
    return tracker


def _run_id(folder: Path) -> str:
    """What other services know the run by: drawn once, kept in the run folder."""
    path = folder / "tracker_id"
    if not path.exists():
        write_atomically(path, os.urandom(6).hex().encode())
    return path.read_text().strip()


_BEGIN: dict[str, Callable[[Path, int, str, Mapping[str, Any]], Any]] = {
    "tensorboard": _begin_tensorboard,
    "wandb": _begin_wandb,
    "trackio": _begin_trackio,
}
