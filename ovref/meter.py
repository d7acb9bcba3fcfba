"""Progress of a loop over items, as a line every few seconds."""

import time
from collections.abc import Callable


class Meter:
    """Says how many items are done, at what rate, and how long the rest will take."""

    def __init__(
        self, total: int, what: str, say: Callable[[str], None], every_seconds: float = 5.0
    ) -> None:
        """
        Args:
            total: items in all.
            what: what is counted, for people: `images`.
        """
        self._total, self._what, self._say, self._every_seconds = total, what, say, every_seconds
        self._done = self._first = 0
        self._started = self._said = time.monotonic()

    def begin(self, done: int) -> None:
        """So many were done before; the rate is measured from here."""
        self._done = self._first = done
        self._started = self._said = time.monotonic()

    def count(self, verb: str = "") -> None:
        """One more is done."""
        self.tell(self._done + 1, verb)

    def tell(self, done: int, verb: str = "") -> None:
        """So many are done; `verb` says what was done with them: `scored`."""
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
