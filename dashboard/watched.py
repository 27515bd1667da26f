"""Everything that is watched, as the answers that the page asks for; each is worked out at most once a second.

folders -> StoreView, Service, WatchedRun, WatchedEvaluation -> status, runs, events, pictures
"""

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dashboard.evaluations import WatchedEvaluation, newest
from dashboard.folders import find_folders
from dashboard.gallery import BOX_PX, LIMITS, Gallery
from dashboard.runs import WatchedRun
from dashboard.service import Service
from dashboard.store_view import StoreView
from shared.beneath import read_beneath
from shared.errors import DataError
from shared.pictures import PixelRules, decode_image
from shared.small_pictures import small_jpeg

KEPT_S = 1.0
LOOK_S = 3.0  # between two looks for new run folders
READ_S = 0.5  # of reading events, for one answer
MOST_EVENTS = 200

Json = dict[str, Any]


class Kept:
    """An answer that is made anew when it is older than KEPT_S; who asks meanwhile waits for the one that makes it."""

    def __init__(self, make: Callable[[], Json], kept_s: float = KEPT_S) -> None:
        self._make, self.kept_s = make, kept_s
        self._making = threading.Lock()
        self._made_s, self._answer = -1e9, Json()

    def fresh(self) -> Json | None:
        """The answer, if it need not be made."""
        return self._answer if time.monotonic() - self._made_s < self.kept_s else None

    def __call__(self) -> Json:
        """The answer, made if need be."""
        with self._making:
            answer = self.fresh()
            if answer is None:
                answer = self._answer = self._make()
                self._made_s = time.monotonic()
            return answer


class Watched:
    """A store, its service, run folders and evaluations."""

    def __init__(self, store: Path, runs: tuple[Path, ...], under: Path | None, sources: tuple[Path, ...]) -> None:
        self.store, self.service = StoreView(store), Service(store)
        self.gallery = Gallery(self.store, lambda: [*sources, *self.service.roots()])
        self._named, self._under = runs, under
        self._runs: dict[Path, WatchedRun] = {}
        self._evaluations: dict[Path, WatchedEvaluation] = {}
        self.look_s, self.read_s = LOOK_S, READ_S
        self._looked_s = -1e9
        self._looking = threading.Lock()
        self.status = Kept(self._status)
        self.runs = Kept(self._all_runs)
        self.events = Kept(self._events)

    def read_all(self) -> None:
        """Take in everything that was logged so far: once, when the page starts, so that the first visit is quick."""
        runs, _ = self._look()
        for run in runs:
            while not run.read(time.monotonic() + READ_S):
                time.sleep(0)

    def evaluation_picture(self, evaluation_id: str, round_number: int, number: int) -> bytes:
        """JPEG of a picture of an evaluation's last round; raises DataError."""
        _, evaluations = self._look()
        one = next((each for each in evaluations if each.id == evaluation_id), None)
        path = one.path(round_number, number) if one else None
        if one is None or path is None:
            raise DataError("no such picture")
        data = read_beneath(one.folder, path, LIMITS.max_bytes)
        return small_jpeg(decode_image(data, PixelRules(), LIMITS), BOX_PX)

    def _look(self) -> tuple[list[WatchedRun], list[WatchedEvaluation]]:
        with self._looking:
            if time.monotonic() - self._looked_s >= self.look_s:
                runs, evaluations = find_folders(self._named, self._under)
                self._runs = {path: self._runs.get(path) or WatchedRun(path) for path in runs}
                known = self._evaluations
                self._evaluations = {path: known.get(path) or WatchedEvaluation(path) for path in evaluations}
                self._looked_s = time.monotonic()
            return list(self._runs.values()), list(self._evaluations.values())

    def _status(self) -> Json:
        return {"store": self.store.as_json(), "service": self.service.as_json()}

    def _all_runs(self) -> Json:
        runs, evaluations = self._look()
        until_s = time.monotonic() + self.read_s
        unread = [run for run in runs if not run.read(until_s)]
        shown = newest(evaluations)
        pictures = shown.as_json() if shown else None
        return {"runs": [run.as_json() for run in runs], "is_read": not unread, "evaluation": pictures}

    def _events(self) -> Json:
        runs, _ = self._look()
        until_s = time.monotonic() + self.read_s
        told = self.service.told()
        for run in runs:
            run.read(until_s)
            told += run.told()
        told.reverse()  # of one moment, what was written later comes first
        told.sort(key=lambda event: -float(event["time_s"]))
        return {"events": told[:MOST_EVENTS]}


def etag_of(body: bytes) -> str:
    """The same for the same bytes."""
    return f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
