"""Reports the progress of a loop over items every few seconds."""

import time
from collections.abc import Callable


class ProgressMeter:
    """Reports the number of items done, the rate, and the remaining time."""

    def __init__(
        self, total: int, what: str, say: Callable[[str], None], every_seconds: float = 5.0
    ) -> None:
        """
        Args:
            total: total number of items.
            what: name of the items in the message: `images`.
        """
        self._total, self._what, self._say, self._every_seconds = total, what, say, every_seconds
        self._done = self._first = 0
        self._started = self._said = time.monotonic()

    def begin(self, done: int) -> None:
        """Sets the number already done; the rate is measured from here on."""
        self._done = self._first = done
        self._started = self._said = time.monotonic()

    def count(self, verb: str = "") -> None:
        """Counts one more item."""
        self.update(self._done + 1, verb)

    def update(self, done: int, verb: str = "") -> None:
        """Sets the number done; `verb` says what was done with them: `scored`."""
        self._done, now = done, time.monotonic()
        if now - self._said < self._every_seconds:
            return
        self._said = now
        rate = (done - self._first) / (now - self._started)
        left = (self._total - done) / rate
        self._say(
            f"{verb} {done} of {self._total} {self._what}, {rate:.3g} {self._what}/s, "
            f"{left:.0f} s to go".strip()
        )
