"""Progress on stderr: a bar with rate and time left on a terminal, a line now and then where there is none.

A process that works for another one tells that one as well (`told`).
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

LINE_EVERY_S = 30.0
Listener = Callable[[str, int, int | None], None]
_listeners: list[Listener] = []


def say(message: str) -> None:
    """One line on stderr."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


@contextlib.contextmanager
def told(listener: Listener) -> Iterator[None]:
    """Call `listener`(task, done, total) too whenever something begins or advances in the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextlib.contextmanager
def progress(task: str, total: int | None, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show `task` advancing from `done` to `total` units; yields a function that takes how many more were done.

    `total` is None where nobody knows it before the end.
    """
    with _shown(task, total, unit, done) as advance:
        yield _telling(task, total, done, advance) if _listeners else advance


def _telling(task: str, total: int | None, done: int, advance: Callable[[int], None]) -> Callable[[int], None]:
    reached = done

    def tell(count: int) -> None:
        nonlocal reached
        reached += count
        for listener in _listeners:
            listener(task, reached, total)

    def both(count: int) -> None:
        advance(count)
        tell(count)

    tell(0)
    return both


@contextlib.contextmanager
def _shown(task: str, total: int | None, unit: str, done: int) -> Iterator[Callable[[int], None]]:
    if sys.stderr.isatty():
        with _bar(task, total, unit, done) as advance:
            yield advance
    else:
        yield _Lines(task, total, unit, done)


class _Lines:
    def __init__(self, task: str, total: int | None, unit: str, done: int = 0) -> None:
        self.task, self.total, self.unit = task, total, unit
        self.done, self.first, self.started_s = done, done, time.monotonic()
        self.said_s = self.started_s

    def __call__(self, count: int) -> None:
        self.done += count
        now_s = time.monotonic()
        if now_s - self.said_s < LINE_EVERY_S:
            return
        self.said_s = now_s
        rate = (self.done - self.first) / (now_s - self.started_s)
        left_s = ((self.total or self.done) - self.done) / rate if rate else 0
        of, left = ("", "") if self.total is None else (f" of {self.total}", f", {left_s:.0f} s left")
        say(f"{self.task}: {self.done}{of}, {rate:.1f} {self.unit}/s{left}")


@contextlib.contextmanager
def _bar(task: str, total: int | None, unit: str, done: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.finished_speed or task.speed or 0:.1f} {unit}/s")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        item = bar.add_task(task, total=total, completed=done)
        yield lambda count: bar.advance(item, count)
