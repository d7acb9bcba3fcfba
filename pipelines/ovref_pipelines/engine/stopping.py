"""Stops a job on a signal, without losing shards in flight."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ovref_pipelines.engine.progress import Progress
from ovref_pipelines.errors import StoppedError


@dataclass
class Drain:
    """Whether a stop was requested."""

    requested_at: float | None = None
    """`time.monotonic()` of the first signal."""

    @property
    def requested(self) -> bool:
        return self.requested_at is not None


@contextmanager
def draining(progress: Progress) -> Iterator[Drain]:
    """Turns the first SIGTERM or SIGINT into a request to stop, the second into StoppedError."""
    drain = Drain()
    if threading.current_thread() is not threading.main_thread():
        yield drain  # signals belong to the main thread
        return

    def on_signal(number: int, _frame: Any) -> None:
        if drain.requested:
            raise StoppedError(f"stopped by a second {signal.Signals(number).name}")
        drain.requested_at = time.monotonic()
        progress.say(
            f"{signal.Signals(number).name}: finishing the shards in progress; "
            "a second signal abandons them; committed shards are kept either way"
        )

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield drain
        if drain.requested:
            raise StoppedError("stopped as asked")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
