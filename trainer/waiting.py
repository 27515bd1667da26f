"""What is started before there is anything to read waits for it: a set of containers starts all at once.

`train-expert --wait` waits for a manifest, `evaluate-experts --watch` for the store.
"""

import time
from pathlib import Path

from shared.errors import Stopped
from shared.manifest import current_digest, list_manifests
from shared.progress import say
from shared.stopping import stop_requests

PAUSE_S = 2.0  # between two looks


def wait_for_manifest(store: Path, name: str, pause_s: float = PAUSE_S) -> None:
    """Return once `store` has a manifest of that name, be it sound or damaged.

    Raises ConfigError where there can be none of that name, Stopped (exit 75) where the process is asked to stop.
    """
    if current_digest(store, name) is not None:
        return
    there = list_manifests(store)
    say(f"waiting for manifest {name!r} in {store}" + (f" (there are: {', '.join(there)})" if there else ""))
    with stop_requests() as stop:
        while name not in list_manifests(store):
            if stop.asked():
                raise Stopped(f"no manifest {name!r} in {store} yet; the same command waits again")
            time.sleep(pause_s)


def wait_for_store(store: Path, pause_s: float = PAUSE_S) -> None:
    """Return once there is a store; raises Stopped (exit 75) where the process is asked to stop."""
    if (store / "store.json").exists():
        return
    say(f"waiting for a store at {store}")
    with stop_requests() as stop:
        while not (store / "store.json").exists():
            if stop.asked():
                raise Stopped(f"no store at {store} yet; the same command waits again")
            time.sleep(pause_s)
