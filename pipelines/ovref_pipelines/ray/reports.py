"""Progress of workers within their shards, through the key-value store that Ray's head keeps for
its own libraries: a worker overwrites one small entry every few seconds, without a process in
between."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterable

from ray.exceptions import RayError
from ray.experimental import internal_kv

from ovref_pipelines.engine.progress import Progress
from ovref_pipelines.engine.reports import REPORT_SECONDS, Report

NAMESPACE = b"ovref"
SHARE_OF_DRIVER = 0.05
"""Maximum share of the driver's time spent on reading reports: with very many workers they are read
less often."""


def publisher(channel: str, step: int) -> Callable[[Report], None]:
    """A function that publishes a worker's reports, for the step of this number."""

    def send(report: Report) -> None:
        content = json.dumps(dataclasses.asdict(report)).encode()
        internal_kv._internal_kv_put(_key(channel, step), content, namespace=NAMESPACE)

    return send


class Reports:
    """The driver's side: passes new reports of workers on to the progress of their steps."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._due = clock, clock() + REPORT_SECONDS
        self._seen: dict[bytes, bytes] = {}

    def read(self, at_work: Callable[[], Iterable[tuple[str, int, str, Progress]]]) -> None:
        """Reads the reports of all busy workers, if it is time.

        Args:
            at_work: returns for each worker its channel, the number of its step, its shard, and the
                progress of that step.
        """
        started = self._clock()
        if started < self._due:
            return
        for channel, step, shard, progress in at_work():
            key = _key(channel, step)
            try:
                content = internal_kv._internal_kv_get(key, namespace=NAMESPACE)
            except RayError:  # the head is briefly unreachable
                break
            if content and content != self._seen.get(key):
                self._seen[key] = content
                report = Report(**json.loads(content))
                if report.shard == shard:  # otherwise it is about the previous shard
                    progress.report(report)
        took = self._clock() - started
        self._due = self._clock() + max(REPORT_SECONDS, took / SHARE_OF_DRIVER)


def forget(channel: str, steps: int) -> None:
    """Removes a worker's reports."""
    for step in range(steps):
        with contextlib.suppress(RayError):
            internal_kv._internal_kv_del(_key(channel, step), namespace=NAMESPACE)


def _key(channel: str, step: int) -> bytes:
    return f"progress/{channel}/{step}".encode()
