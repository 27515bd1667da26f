"""When the service builds next: at once, after a quiet period, or again after a failure."""

import math
import time
from collections.abc import Callable

from cache_builder.serve_config import ServiceRules

MOST_PAUSE_S = 3600.0


class Agenda:
    """The first build is due at once; from then on changes and failures decide."""

    def __init__(self, rules: ServiceRules, clock: Callable[[], float] = time.monotonic) -> None:
        self._rules, self._clock = rules, clock
        self._pause_s = rules.retry_s
        self._at_s = -math.inf  # a build that waits for no change
        self._first_s, self._last_s = math.inf, math.inf  # changes since the last build began

    def change(self) -> None:
        """Something has changed just now."""
        self._last_s = self._clock()
        self._first_s = min(self._first_s, self._last_s)

    def is_due(self) -> bool:
        """Whether a build should begin."""
        quiet_at_s = min(self._last_s + self._rules.quiet_s, self._first_s + self._rules.patience_s)
        return self._clock() >= min(self._at_s, quiet_at_s)

    @property
    def waits_for_quiet(self) -> bool:
        """Whether there are changes that no build has begun with."""
        return self._last_s < math.inf

    def begin(self) -> None:
        """A build begins, with everything up to now."""
        self._at_s = self._first_s = self._last_s = math.inf

    def again(self, pause_s: float) -> None:
        """What is due is put off by `pause_s` seconds."""
        self._at_s = self._clock() + pause_s
        self._first_s = self._last_s = math.inf

    def fail(self) -> float:
        """A build died; returns after how long it is tried again, seconds, doubled each time up to an hour."""
        pause_s = self._pause_s
        self._pause_s = max(self._rules.retry_s, min(2 * pause_s, MOST_PAUSE_S))
        self._at_s = self._clock() + pause_s
        return pause_s

    def succeed(self) -> None:
        """A build went through."""
        self._pause_s = self._rules.retry_s
