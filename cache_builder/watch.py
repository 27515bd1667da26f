"""Which paths have changed under the roots of the data sets: told by the system, and looked for now and then.

watchfiles (inotify, FSEvents) --\
                                  FolderWatch, one thread for each root -> Watch -> serve.py
a look at names, sizes and times -/    network disks tell nothing, and a system may have no watches left

What a build does not read wakes nothing: hidden names, the store, run folders. A root that vanishes and comes back, as
a disk does, is a change.
"""

import os
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import watchfiles

from cache_builder.config import DatasetConfig
from shared.file_system import network_kind
from shared.progress import say

STEP_MS = 50  # changes that come closer together than this come as one
TICK_MS = 500  # between two looks at whether the root is still the same
PAUSE = 10  # looks take at most one part in so many of the time
MOST_NAMED = 100_000  # paths that are told apart


class Watch:
    """All roots of a build."""

    def __init__(
        self, datasets: Sequence[DatasetConfig], ignored: Collection[Path], look_s: float, poll_s: float
    ) -> None:
        """Watches from now on; has looked at everything once when it returns."""
        self._stop = threading.Event()
        depth: dict[Path, bool] = {}
        for dataset in datasets:
            depth[_place(dataset)] = _is_deep(dataset) or depth.get(_place(dataset), False)
        self._folders = [
            FolderWatch(place, is_deep, ignored, look_s, poll_s, self._stop) for place, is_deep in depth.items()
        ]

    def take(self) -> set[str]:
        """Paths that have changed since the last call."""
        return set[str]().union(*(folder.take() for folder in self._folders))

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        for folder in self._folders:
            folder.join()


class FolderWatch:
    """One root, watched by a thread."""

    def __init__(
        self,
        place: Path,
        is_deep: bool,
        ignored: Collection[Path],
        look_s: float,
        poll_s: float,
        stop: threading.Event,
    ) -> None:
        self._place, self._is_deep = place, is_deep
        self._ignored = {os.path.realpath(path) for path in ignored}
        self._poll_s, self._stop = poll_s, stop
        self._every_s = min(look_s, poll_s) if network_kind(place) else look_s
        self._changed: set[str] = set()
        self._lock = threading.Lock()
        self._root = _identity(self._place)
        self._seen, self._look_at_s = self._look()
        self._thread = threading.Thread(target=self._run, name=f"watch {place}", daemon=True)
        self._thread.start()

    def take(self) -> set[str]:
        """Paths that have changed since the last call."""
        with self._lock:
            changed, self._changed = self._changed, set()
        return changed

    def join(self) -> None:
        """Wait for the thread, which ends when `stop` is set."""
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._root is None:  # until the disk is there again
                self._stop.wait(TICK_MS / 1000)
                self._look_if_due()
                continue
            try:
                self._follow()
            except (OSError, RuntimeError) as error:  # as watchfiles says that there are no watches left
                if self._look_if_due():
                    say(f"{self._place} cannot be watched ({error}): it is looked through every {self._poll_s:g} s")
                    self._every_s = min(self._every_s, self._poll_s)
                    self._look_at_s = min(self._look_at_s, time.monotonic() + self._every_s)
                    self._poll()

    def _follow(self) -> None:
        """Note what the system tells, until the root is another one."""
        changes = watchfiles.watch(
            os.path.realpath(self._place),
            watch_filter=self._counts,
            step=STEP_MS,
            stop_event=self._stop,
            rust_timeout=TICK_MS,
            yield_on_timeout=True,
            raise_interrupt=False,
            poll_delay_ms=int(self._poll_s * 1000),  # where watchfiles itself takes to polling, as under WSL
            recursive=self._is_deep,
            ignore_permission_denied=True,
        )
        self._look_at_s = 0.0  # what changed between the last look and the system's first word
        for some in changes:
            self._note(path for _, path in some)
            if not self._look_if_due():
                return

    def _poll(self) -> None:
        while not self._stop.wait(TICK_MS / 1000) and self._look_if_due():
            pass

    def _look_if_due(self) -> bool:
        """Look through the folder if it is time; returns whether the root is the one that is watched."""
        root = _identity(self._place)
        if root != self._root:
            self._root = root
            self._note([str(self._place)])
            return False
        if time.monotonic() >= self._look_at_s:
            before = self._seen
            self._seen, self._look_at_s = self._look()
            if self._seen != before:
                self._note([str(self._place)])
        return True

    def _look(self) -> tuple[int, float]:
        """A number that changes with any name, size or time below the place; and when to look again."""
        began_s = time.monotonic()
        total, folders = 0, [os.path.realpath(self._place)]
        while folders and not self._stop.is_set():
            for entry in _entries(folders.pop()):
                if entry.name.startswith(".") or entry.path in self._ignored:
                    continue
                try:
                    state = entry.stat(follow_symlinks=False)
                    if self._is_deep and entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                except OSError:
                    continue
                total += hash((entry.path, state.st_size, state.st_mtime_ns, state.st_ino))  # in any order
        now_s = time.monotonic()
        return total, now_s + max(self._every_s, PAUSE * (now_s - began_s))

    def _counts(self, _: Any, path: str) -> bool:
        """Whether a change of `path`, as the system names it, is one of what a build reads."""
        inside = os.path.relpath(path, os.path.realpath(self._place)).split(os.sep)
        if any(part.startswith(".") for part in inside if part not in (".", "..")):
            return False
        return not any(path == folder or path.startswith(folder + os.sep) for folder in self._ignored)

    def _note(self, paths: Iterable[str]) -> None:
        with self._lock:
            for path in paths:
                if len(self._changed) < MOST_NAMED:
                    self._changed.add(path)


def _place(dataset: DatasetConfig) -> Path:
    """The folder to watch: the root, or the one that a table or shards lie in."""
    if dataset.kind == "folder" or dataset.folder.is_dir():
        return dataset.folder
    place = dataset.folder.parent
    while "{" in str(place):  # a pattern of shards
        place = place.parent
    return place


def _is_deep(dataset: DatasetConfig) -> bool:
    """Whether what lies in sub-folders counts: a table's pictures may, and a pattern's shards."""
    return dataset.kind != "webdataset" or dataset.folder.is_dir() or "{" in str(dataset.folder.parent)


def _identity(place: Path) -> tuple[int, int] | None:
    try:
        state = place.stat()
    except OSError:
        return None
    return state.st_dev, state.st_ino


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []
