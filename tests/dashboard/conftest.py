"""The page's tests ask it as a browser would, over a small store that lies on disk, with pictures and logs of runs."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from benchmarks.dashboard_world import write_run, write_store
from dashboard.access import Access, choose_access
from dashboard.app import make_app
from dashboard.watched import Watched

ADDRESS = "http://127.0.0.1:8765"
SAMPLES = 60
CAPTIONS = [f"a caption, number {index}" for index in range(20)]


@dataclass(frozen=True)
class World:
    """A store, the pictures that it was made of, and the folder of its runs."""

    store: Path
    pictures: Path
    runs: Path

    def say_status(self, **changes: Any) -> None:
        """Write what a service would."""
        (self.store / "service").mkdir(exist_ok=True)
        said = {
            "version": 1,
            "pid": 0,
            "host": "elsewhere",
            "started_s": 0.0,
            "beat_s": time.time(),
            "state": "waiting",
        }
        said |= {"manifest": "main", "folders": [str(self.pictures)], "phase": None, "done": 0, "total": 0}
        said |= {"images_per_s": None, "changed": 0, "builds": 1, "quarantined": 0, "quarantine": []}
        said |= {"last_seal": None, "last_error": None, "kept": []}
        (self.store / "service" / "status.json").write_text(json.dumps(said | changes))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """60 pictures in four sizes with 20 captions, and two runs; tests must not write into it."""
    folder = tmp_path_factory.mktemp("page")
    made = World(folder / "store", folder / "pictures", folder / "runs")
    write_store(made.store, SAMPLES, CAPTIONS, made.pictures)
    write_run(made.runs / "base", "base", 350, 1000, 500)
    write_run(made.runs / "refiner", "refiner", 0, 350, 500)
    return made


@pytest.fixture
def ask() -> Iterator[Callable[..., TestClient]]:
    """Makes a client of a page; what a page keeps for a second is never waited for in tests."""
    opened: list[Watched] = []

    def make(
        store: Path,
        *runs: Path,
        under: Path | None = None,
        sources: tuple[Path, ...] = (),
        access: Access | None = None,
    ) -> TestClient:
        watched = Watched(store, runs, under, sources)
        for answer in (watched.status, watched.runs, watched.events):
            answer.kept_s = 0.0
        watched.look_s, watched.read_s = 0.0, 60.0
        opened.append(watched)
        app = make_app(watched, access or choose_access("127.0.0.1", None, []))
        client = TestClient(app, base_url=ADDRESS, raise_server_exceptions=False, follow_redirects=False)
        client.watched = watched
        return client

    yield make
    for watched in opened:
        watched.store.close()
