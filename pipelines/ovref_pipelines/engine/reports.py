"""Progress of a worker within its shard, reported every few seconds."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ovref.devices import cuda

logger = logging.getLogger(__name__)

REPORT_SECONDS = 2.0
"""Interval between two reports of a worker; a faster shard has none."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Progress of a worker. Plain data, to be sent."""

    shard: str
    done: int
    """Records of the shard that have outputs or were dropped."""
    dropped: int
    """Records and regions dropped so far."""
    gpu_used_bytes: int | None = None
    """Memory in use on its GPU by all processes; None without a GPU, like the two below."""
    gpu_total_bytes: int | None = None
    gpu_busy: float | None = None
    """Recent GPU utilisation, 0 to 1; None if unknown."""


@contextlib.contextmanager
def reporting(
    send: Callable[[Report], None] | None, shard: str, every_seconds: float | None = None
) -> Iterator[Callable[[int, int], None]]:
    """Reports the progress of a shard every few seconds (`REPORT_SECONDS`) during the block.

    Yields a function to call with the numbers of processed records and of drops so far. `send` is
    called from a separate thread, so that a long batch does not silence it.
    """
    if send is None:
        yield lambda done, dropped: None
        return
    seconds = REPORT_SECONDS if every_seconds is None else every_seconds
    over, latest = threading.Event(), [(0, 0)]

    def watch(done: int, dropped: int) -> None:
        latest[0] = (done, dropped)

    def repeat() -> None:
        while not over.wait(seconds):
            done, dropped = latest[0]
            try:
                send(Report(shard=shard, done=done, dropped=dropped, **gpu()))
            except Exception as error:  # a failed report must not stop the work
                logger.warning("progress of shard %s cannot be reported: %s", shard, error)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()


def gpu() -> dict[str, Any]:
    """Fields of a `Report` about this process's GPU; empty if it uses none."""
    device = cuda()
    if device is None or not device.is_initialized():
        return {}
    free, total = device.mem_get_info()
    busy = None
    # Queries the driver through nvidia-ml-py, which may be missing, or forbidden on a rented GPU.
    with contextlib.suppress(ModuleNotFoundError, RuntimeError):
        busy = device.utilization() / 100
    return {"gpu_used_bytes": total - free, "gpu_total_bytes": total, "gpu_busy": busy}
