"""Steps that work side by side: each in a thread, a few results ahead of whoever takes them.

    decode and batch | encode | commit        a build
    read a batch | train on it                a trainer
Each | is an Ahead: what stands left of it runs in threads of its own.
"""

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_END = object()


class Dealt(Generic[T]):
    """Items of which several threads each take the next one."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items, self._taking = iter(items), threading.Lock()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._taking:
                item = next(self._items, _END)
            if item is _END:
                return
            yield item  # type: ignore[misc]


class Ahead(Generic[T]):
    """What `sources` give, in the order in which it is made; any number of threads may take from it.

    Each source runs in a thread of its own and rests when `count` results are not taken yet: that bounds the memory.
    It goes on at `again_at` of them, by default as soon as one is taken; fewer let it make several at a stretch, which
    disturbs the taker less often. An error of a source is raised to the taker after the results that came before it.
    """

    def __init__(self, *sources: Iterable[T], count: int, again_at: int | None = None) -> None:
        self._count, self._going = count, len(sources)
        self._again_at = count - 1 if again_at is None else again_at
        self._resting = False
        self._made: deque[T] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._stopped = False
        # Daemons, so that a second Ctrl-C ends the process in the middle of a batch.
        self._threads = [threading.Thread(target=self._work, args=(iter(each),), daemon=True) for each in sources]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._made or self._error or self._stopped or not self._going)
            if self._made and not self._stopped:
                item = self._made.popleft()
                if len(self._made) <= self._again_at:
                    self._changed.notify_all()
                return item
            if self._error and not self._stopped:
                self._stopped = True
                raise self._error
            raise StopIteration

    def stop(self) -> None:
        """Make no more and give no more; returns at once."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def __enter__(self) -> "Ahead[T]":
        return self

    def __exit__(self, *_: object) -> None:
        """Stop, and wait until no source runs any more."""
        self.stop()
        for thread in self._threads:
            thread.join()

    def _work(self, source: Iterator[T]) -> None:
        error: BaseException | None = None
        try:
            while self._has_room():
                item = next(source, _END)
                if item is _END:
                    break
                with self._changed:
                    self._made.append(item)  # type: ignore[arg-type]
                    self._changed.notify_all()
        except BaseException as raised:  # noqa: BLE001 -- it is raised where the results are taken
            error = raised
        finally:
            if isinstance(source, Generator):
                source.close()  # in the thread that ran it
            with self._changed:
                self._going -= 1
                self._error = self._error or error
                self._changed.notify_all()

    def _has_room(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._error or not self._is_resting())
            return not (self._stopped or self._error)

    def _is_resting(self) -> bool:
        if len(self._made) >= self._count:
            self._resting = True
        elif len(self._made) <= self._again_at:
            self._resting = False
        return self._resting
