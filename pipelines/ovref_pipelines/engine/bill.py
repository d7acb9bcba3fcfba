"""What the workers of a run have cost so far."""

import time
from collections.abc import Callable


class Bill:
    """Adds up what workers are held for how long, at a price an hour."""

    def __init__(
        self,
        price: float | None,
        *,
        of_gpus: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            price: of a GPU-hour, or of a worker's hour where workers have no GPU; None if unknown.
            of_gpus: whether GPUs are paid for, and workers without one cost nothing extra.
            clock: gives seconds and only ever grows.
        """
        self._price, self._of_gpus, self._clock = price, of_gpus, clock
        self._held, self._since, self._seconds = 0.0, clock(), 0.0

    def holds(self, workers: int, gpus: float) -> None:
        """From now on so many workers with so many GPUs in all."""
        self._seconds += self._held * (self._clock() - self._since)
        self._since = self._clock()
        self._held = gpus if self._of_gpus else workers

    @property
    def amount(self) -> float | None:
        """The cost so far; None where the price is not known."""
        if self._price is None:
            return None
        now = self._seconds + self._held * (self._clock() - self._since)
        return now / 3600 * self._price
