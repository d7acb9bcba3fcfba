"""How fast records are done, from the moments at which some were."""

import itertools
import time
from collections import deque
from collections.abc import Callable

RECENT_CHANGES = 40
"""The rate is measured over this many of the latest changes (and at least eight per worker)."""
APART_SECONDS = 1.0
"""Changes nearer to each other than this are one."""


class Rate:
    """Records a second, over the recent changes of a count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds and only ever grows."""
        self._clock = clock
        self.begin(workers=1)

    def begin(self, workers: int) -> None:
        """Measures from now on, from a count of 0."""
        span = max(RECENT_CHANGES, 8 * workers) + 1
        self._changes: deque[tuple[float, int]] = deque([(self._clock(), 0)], maxlen=span)

    def at(self, count: int) -> None:
        """So many records are done now; fewer than before where work was lost."""
        if count == self._changes[-1][1]:
            return
        now = self._clock()
        if len(self._changes) > 1 and now - self._changes[-2][0] < APART_SECONDS:
            self._changes.pop()
        self._changes.append((now, count))

    def per_second(self) -> float | None:
        """Records a second; None before the first is done.

        Records come in batches. Only when the next batch is later than any before it, the time
        since the last one counts too: otherwise the rate would sink and jump with every batch.
        """
        first, last = self._changes[0], self._changes[-1]
        seconds = last[0] - first[0] + max(0.0, self._idle() - self._longest())
        if len(self._changes) < 2 or seconds <= 0 or last[1] <= first[1]:
            return None
        return (last[1] - first[1]) / seconds

    def to_go(self, records: int) -> float | None:
        """Seconds that so many records still take; None before the first is done."""
        rate = self.per_second()
        if rate is None:
            return None
        return max(0.0, records / rate - min(self._idle(), self._longest()))

    def _idle(self) -> float:
        return self._clock() - self._changes[-1][0]

    def _longest(self) -> float:
        """Seconds of the longest time between two changes."""
        moments = [moment for moment, _ in self._changes]
        return max((later - at for at, later in itertools.pairwise(moments)), default=0.0)
