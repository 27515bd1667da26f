"""Who does what on a cluster: tasks to workers, a few ahead of each; what dies with one is given to another.

ray_runner.py hires and hands over tasks -> Crew.answers -> what the workers said, in any order

A task may be done more than once; its id is the digest of what it says, and its first answer is the one that counts.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from shared.errors import DataError, ExpertsError, Stopped
from shared.progress import say

IN_FLIGHT = 2  # for each worker: one that is encoded and one that is decoded
LOOK_S = 1.0
LOST_S = 300.0  # without a single worker; a cluster may be replacing a machine
DEATHS_AMONG_OTHERS = 4  # of workers over one task, the last three with nothing else to do; then it is set aside
DEATHS_AT_THE_END = 3  # more, with no other task in the whole cluster: workers die of other things too, not for ever
MOST_FAILED_STARTS = 5  # of workers in a row


@dataclass(eq=False)
class Task:
    """Something for a worker to do; `what` names it to people, `tag` is for whoever gets the answer."""

    tag: Any
    what: str
    message: bytes
    deaths: int = 0

    @cached_property
    def id(self) -> bytes:
        """Digest of the message."""
        return hashlib.blake2b(self.message, digest_size=16).digest()


@dataclass(eq=False)
class Hand:
    """One worker of the crew."""

    actor: Any
    tasks: int = 0
    is_ready: bool = False
    is_alone: bool = False
    """Whether it has a task over which another one died: it gets no other meanwhile."""

    @property
    def has_room(self) -> bool:
        """Whether it may be given a task."""
        return self.is_ready and not self.is_alone and self.tasks < IN_FLIGHT


class Cluster(Protocol):
    """What a crew asks of Ray."""

    def hire(self) -> Any:
        """A new worker, which need not have begun yet."""
        ...

    def dismiss(self, actor: Any) -> None:
        """End a worker, dead or alive."""
        ...

    def call(self, actor: Any, message: bytes | None) -> Any:
        """Ask a worker to do a task, or to check itself; what its answer is known by until it is there."""
        ...

    def wait(self, calls: list[Any], timeout_s: float) -> list[Any]:
        """Those of `calls` that are done; some if any is within `timeout_s`."""
        ...

    def answer(self, call: Any) -> bytes | None:
        """What a call that is done gave; None where its worker died. Raises ExpertsError where it failed."""
        ...


@dataclass(eq=False)
class Crew:
    """`count` workers, hired when there is something to do."""

    cluster: Cluster
    count: int
    again: deque[Task] = field(default_factory=deque)
    """Tasks that come before all others."""

    _aside: deque[Task] = field(default_factory=deque)
    """Tasks over which many died: done when there is nothing else, one at a time."""

    _hands: list[Hand] = field(default_factory=list)
    _flying: dict[Any, tuple[Hand, Task | None]] = field(default_factory=dict)
    _done: set[bytes] = field(default_factory=set)
    _failed_starts: int = 0

    def answers(self, tasks: Iterable[Task], read: Callable[[bytes], Any]) -> Generator[tuple[Task, Any]]:
        """Each task with read(answer), once, as they come; `read` raises what an answer says.

        Raises DataError where one task ends worker after worker, when all others are done; Stopped where the cluster
        has no worker left.
        """
        rest, seen_s = iter(tasks), time.monotonic()
        if (first := self._next(rest, is_idle=True)) is None:
            return
        self.again.appendleft(first)
        while len(self._hands) < self.count:
            self._hire()
        while True:
            self._hand_out(rest)
            if self._is_idle and not self.again and not self._aside and self._is_out(rest):
                return
            if any(hand.is_ready for hand in self._hands):
                seen_s = time.monotonic()
            elif time.monotonic() - seen_s > LOST_S:
                raise Stopped(
                    f"no worker of the Ray cluster has been ready for {LOST_S:.0f} s (are there machines with the GPU "
                    "or the CPUs that it asks for?); what was stored stays, and the same command goes on"
                )
            for call in self.cluster.wait([*self._flying], LOOK_S):
                yield from self._landed(call, read)

    def close(self) -> None:
        """Let everybody go."""
        for hand in self._hands:
            self.cluster.dismiss(hand.actor)
        self._hands.clear()
        self._flying.clear()
        self.again.clear()
        self._aside.clear()

    @property
    def _is_idle(self) -> bool:
        """Whether nobody has a task."""
        return not any(task for _, task in self._flying.values())

    def _hire(self) -> None:
        hand = Hand(self.cluster.hire())
        self._hands.append(hand)
        self._flying[self.cluster.call(hand.actor, None)] = hand, None

    def _hand_out(self, rest: Iterator[Task]) -> None:
        while free := [hand for hand in self._hands if hand.has_room]:
            hand = min(free, key=lambda hand: hand.tasks)
            if (task := self._next(rest, is_idle=not hand.tasks)) is None:
                return
            hand.tasks += 1
            hand.is_alone = task.deaths > 0
            self._flying[self.cluster.call(hand.actor, task.message)] = hand, task

    def _next(self, rest: Iterator[Task], *, is_idle: bool) -> Task | None:
        for index, task in enumerate(self.again):
            if is_idle or not task.deaths:
                del self.again[index]
                return task
        if (another := next(rest, None)) is None and self._aside and self._is_idle:
            return self._aside.popleft()
        return another

    def _is_out(self, rest: Iterator[Task]) -> bool:
        """Whether there is no task more, where nobody could be given one."""
        if (task := next(rest, None)) is not None:
            self.again.append(task)
        return task is None

    def _landed(self, call: Any, read: Callable[[bytes], Any]) -> Iterator[tuple[Task, Any]]:
        hand, task = self._flying.pop(call)
        answer = self.cluster.answer(call)
        if answer is None:
            self._bury(hand, task)
            return
        said = read(answer)
        if task is None:
            hand.is_ready, self._failed_starts = True, 0
            return
        hand.tasks -= 1
        hand.is_alone = False
        if task.id not in self._done:
            self._done.add(task.id)
            yield task, said

    def _bury(self, hand: Hand, task: Task | None) -> None:
        if task is None:
            self._failed_starts += 1
        elif task.id not in self._done:
            self._mourn(task, was_alone=hand.is_alone)
        if hand not in self._hands:
            return
        self._hands.remove(hand)
        self.cluster.dismiss(hand.actor)
        if self._failed_starts > MOST_FAILED_STARTS:
            raise ExpertsError(
                f"{self._failed_starts} workers of the Ray cluster in a row ended before they had begun: look at the "
                "logs of a machine (/tmp/ray/session_latest/logs); what was stored stays"
            )
        say("a worker of the Ray cluster has died; what it had is done again")
        self._hire()

    def _mourn(self, task: Task, *, was_alone: bool) -> None:
        task.deaths += was_alone or not task.deaths
        if task.deaths < DEATHS_AMONG_OTHERS:
            self.again.append(task)
            return
        if task.deaths == DEATHS_AMONG_OTHERS:
            say(f"{task.deaths} workers died over {task.what}: it waits until all others are done")
        if task.deaths == DEATHS_AMONG_OTHERS + DEATHS_AT_THE_END:
            raise DataError(
                f"{task.deaths} workers died over {task.what}, the last {DEATHS_AT_THE_END} with no other task in the "
                "cluster: is the memory of a machine too small for it (lower encode.batch or ray.chunk), or is one of "
                "them harmful? All others are done, and what was stored stays"
            )
        self._aside.append(task)
