"""SIGTERM and SIGINT become a request that a loop answers between two steps; a second SIGINT interrupts at once.

A request is never answered where it arrives: an exception raised inside a library's compiled code may come out of it
as another one, or not at all.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Set by a signal, looked at by the loop."""

    def __init__(self) -> None:
        self._asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True

    def asked(self) -> bool:
        """Whether there was a signal by now."""
        return self._asked


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Collect requests to stop for the length of the block."""
    request = StopRequest()
    previous = {number: signal.signal(number, request) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
