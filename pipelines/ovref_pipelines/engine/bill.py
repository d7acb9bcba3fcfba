"""What the workers of a run have cost so far."""

import time
from collections.abc import Callable


class Bill:
    """Adds up the hours of held workers or GPUs at a price per hour."""

    def __init__(
        self,
        price: float | None,
        *,
        of_gpus: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            price: price per GPU-hour, or per worker-hour if workers have no GPU; None if unknown.
            of_gpus: whether GPUs are paid for; workers without one then cost nothing extra.
            clock: monotonic, in seconds.
        """
        self._price, self._of_gpus, self._clock = price, of_gpus, clock
        self._held, self._since, self._seconds = 0.0, clock(), 0.0

    def holds(self, workers: int, gpus: float) -> None:
        """Sets the number of workers held from now on, and of their GPUs in total."""
        self._seconds += self._held * (self._clock() - self._since)
        self._since = self._clock()
        self._held = gpus if self._of_gpus else workers

    @property
    def amount(self) -> float | None:
        """The cost so far; None if the price is unknown."""
        if self._price is None:
            return None
        now = self._seconds + self._held * (self._clock() - self._since)
        return now / 3600 * self._price
