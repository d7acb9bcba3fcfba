"""Rate of processing, from the times at which records were finished."""

import itertools
import time
from collections import deque
from collections.abc import Callable

RECENT_CHANGES = 40
"""The rate is measured over this many of the latest changes (and at least eight per worker)."""
APART_SECONDS = 1.0
"""Changes closer together than this count as one."""


class Rate:
    """Records per second over the recent changes of a count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` is monotonic, in seconds."""
        self._clock = clock
        self.begin(workers=1)

    def begin(self, workers: int) -> None:
        """Measures from now on, from a count of 0."""
        span = max(RECENT_CHANGES, 8 * workers) + 1
        self._changes: deque[tuple[float, int]] = deque([(self._clock(), 0)], maxlen=span)

    def at(self, count: int) -> None:
        """Sets the number of records done now; it falls if work was lost."""
        if count == self._changes[-1][1]:
            return
        now = self._clock()
        if len(self._changes) > 1 and now - self._changes[-2][0] < APART_SECONDS:
            self._changes.pop()
        self._changes.append((now, count))

    def per_second(self) -> float | None:
        """Records per second; None before the first is done.

        Records come in batches. The time since the last one counts only once it exceeds the longest
        gap so far; otherwise the rate would fall and jump with every batch.
        """
        first, last = self._changes[0], self._changes[-1]
        seconds = last[0] - first[0] + max(0.0, self._idle() - self._longest())
        if len(self._changes) < 2 or seconds <= 0 or last[1] <= first[1]:
            return None
        return (last[1] - first[1]) / seconds

    def to_go(self, records: int) -> float | None:
        """Seconds that this many records will take; None before the first is done."""
        rate = self.per_second()
        if rate is None:
            return None
        return max(0.0, records / rate - min(self._idle(), self._longest()))

    def _idle(self) -> float:
        return self._clock() - self._changes[-1][0]

    def _longest(self) -> float:
        """Longest time between two changes, in seconds."""
        moments = [moment for moment, _ in self._changes]
        return max((later - at for at, later in itertools.pairwise(moments)), default=0.0)
