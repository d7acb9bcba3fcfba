"""Progress of a running step: records done, records per second, remaining time.

On a terminal it draws one bar per step with `line()` beside it; elsewhere (a log, a cluster job) it
prints `line()` at intervals, or the same as one JSON object per line. The rate is that of the last
few batches of this run, so there is no estimate before the first one is finished. A `Meter` exports
the counts to a metrics system, a `Watcher` to `progress.json`.

The engine calls `begin` once, then `report`, `finished`, `quarantined`, `more` and `failed` as
events occur, `tick` often and `close` at the end. All outputs come from `line`, `counts` and the
share done that `_bar` gives. Workers in this process report from a separate thread.
"""

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol, TextIO

from ovref_pipelines.bar import REDRAW_SECONDS, Bars
from ovref_pipelines.console import json_line
from ovref_pipelines.engine.bill import Bill
from ovref_pipelines.engine.rate import Rate
from ovref_pipelines.engine.reports import Report

Watcher = Callable[[list[dict[str, Any]]], None]
"""Called often with the `Progress.counts` of the steps that run concurrently."""


class Meter(Protocol):
    """Receives the counts of a step as well."""

    def finished(self, inputs: int, outputs: int, dropped: dict[str, int]) -> None:
        """A shard is committed."""

    def failed(self, what: str) -> None:
        """One of `Ledger.tallies` has grown."""

    def update_state(self, shards_waiting: int, workers: int, records_per_second: float) -> None:
        """Current state of the step."""


class Progress:
    """Counts one step's records and prints its progress."""

    def __init__(
        self,
        step: str,
        *,
        every_seconds: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        log: str = "text",
        meter: Meter | None = None,
        bill: Bill | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        """`stream` defaults to stderr; `clock` is monotonic, in seconds; `log` is `text` or `json`;
        `bill` is the build's, updated by the code that starts workers."""
        self._step = step
        self._every_seconds = every_seconds
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._json = log == "json"
        self._live = self._stream.isatty() and not self._json
        self._meter = meter
        self._shown: list[Progress] = [self]
        self._leader = self
        self.bill = bill or Bill(None, of_gpus=False, clock=clock)
        self._watcher = watcher
        self._total = self._done = self._to_go = self._quarantined = 0
        self._records_before = self._records_now = 0
        self._announced = 0
        self._ready = False
        self._dropped: Counter[str] = Counter()
        self._reports: dict[str, Report] = {}
        self._rate = Rate(clock)
        self._printed = clock()
        self._bars = Bars(self._stream)
        self._lock = threading.RLock()

    def begin(
        self, total: int, done: int, records_to_go: int, workers: int, records_done: int = 0
    ) -> None:
        """`done` of `total` shards, with `records_done`, were finished by earlier runs; the rest
        hold the records to go."""
        self._total, self._done, self._to_go = total, done, records_to_go
        self._records_before = records_done
        self._rate.begin(workers)
        if done < total:
            self.say(f"{total - done} of {total} shards to do, {records_to_go} records")

    def meter_to(self, meter: Meter) -> None:
        """Sends counts to `meter` from now on."""
        self._meter = meter

    def show_with(self, other: "Progress") -> None:
        """Shows `other`, of a concurrent step, together with this one."""
        self._leader._shown.append(other)
        other._leader, other._lock = self._leader, self._lock

    def expect_shards(self, shards: int) -> None:
        """The previous step still has this many shards to make; `more` adds each. Until then the
        number of records is unknown, and there is no estimate."""
        self._announced = shards

    def more(self, inputs: int) -> None:
        """A shard of `inputs` records was added."""
        self._to_go += inputs
        self._announced -= 1

    def working(self, workers: int) -> None:
        """The first worker has loaded its models: rates are measured from here."""
        with self._lock:
            self._rate.begin(workers)
            self._ready = True

    def report(self, report: Report) -> None:
        """Progress of a worker within its shard; may be called from any thread."""
        with self._lock:
            self._reports[report.shard] = report
            self._rate.at(self._records())
        self.tick()

    def lost(self, shard: str) -> None:
        """A worker's progress within a shard is lost."""
        with self._lock:
            self._reports.pop(shard, None)
            self._rate.at(self._records())

    def finished(
        self, shard: str, inputs: int, dropped: dict[str, int], outputs: int = 0
    ) -> None:
        """A shard of `inputs` records is committed, with drops counted by reason."""
        with self._lock:
            self._reports.pop(shard, None)
            self._done += 1
            self._to_go -= inputs
            self._records_now += inputs
            self._dropped.update(dropped)
            self._rate.at(self._records())
            if self._meter is not None:
                self._meter.finished(inputs, outputs, dropped)
            more = self._done < self._total
        if more:
            self.tick()

    def quarantined(self, shard: str, inputs: int) -> None:
        """A shard of `inputs` records is quarantined."""
        with self._lock:
            self.lost(shard)
            self._quarantined += 1
            self._to_go -= inputs

    def failed(self, what: str) -> None:
        """Counts an event that has a tally: a retry, a lost worker."""
        if self._meter is not None:
            self._meter.failed(what)

    def update_state(self, shards_waiting: int, workers: int) -> None:
        """For the meter: unassigned shards, and workers with loaded models."""
        if self._meter is not None:
            self._meter.update_state(shards_waiting, workers, self.records_per_second() or 0.0)

    def tick(self) -> None:
        """Prints if the interval has passed; call it often."""
        if self._leader is not self:
            self._leader.tick()
            return
        with self._lock:
            counts = [progress.counts() for progress in self._shown] if self._watcher else []
            now = self._clock()
            if now - self._printed >= (REDRAW_SECONDS if self._live else self._every_seconds):
                self._printed = now
                self._tell()
        if self._watcher is not None:  # it may write to a slow store: not while others wait
            self._watcher(counts)

    def _tell(self) -> None:
        """Prints where the steps stand."""
        if self._live:
            self._bars.show([(step.line(), *step._bar()) for step in self._shown])
        elif self._json:
            for progress in self._shown:
                line = progress.line()
                self._bars.print(json_line(progress._step, "progress", line, progress.counts()))
        else:
            self._bars.print("; ".join(progress.line() for progress in self._shown))

    def say(self, message: str, event: str = "note", **fields: Any) -> None:
        """Prints a separate line: a failed shard, a lost worker.

        Args:
            event: what kind of message it is, for programs; with `fields` about it.
        """
        line = f"{self._step}: {message}"
        with self._lock:
            self._leader._bars.print(
                json_line(self._step, event, message, fields) if self._json else line
            )

    def close(self) -> None:
        """Removes the bars from the terminal."""
        if self._leader is self and self._watcher is not None:
            self._watcher([progress.counts() for progress in self._shown])
        self._bars.close()

    def records_per_second(self) -> float | None:
        """Input records per second over the recent batches; None before the first is finished."""
        return self._rate.per_second()

    def line(self) -> str:
        """Current state of the step."""
        done, total = self._bar()
        parts = [f"{self._step}: {done}/{'?' if self._announced > 0 else total} records"]
        if rate := self.records_per_second():
            parts.append(f"{rate:.3g} records/s")
        if self._announced <= 0:
            seconds = self._rate.to_go(total - done)
            if seconds is not None:
                parts.append(f"{duration(seconds)} to go")
            elif self._ready:
                parts.append("time to go unknown until the first batch is finished")
            else:
                parts.append("workers are loading their models")
        dropped = sum(self._dropped.values()) + sum(r.dropped for r in self._reports.values())
        if dropped:
            parts.append(f"{dropped} drops")
        if self._quarantined:
            parts.append(f"{self._quarantined} shards quarantined")
        if used := self._gpu():
            busy = "" if used["busy"] is None else f" {used['busy']:.0%} busy,"
            parts.append(f"GPU{busy} {used['used_bytes'] / 1e9:.3g} of "
                         f"{used['total_bytes'] / 1e9:.3g} GB")
        if (cost := self.bill.amount) is not None:
            parts.append(f"cost so far {cost:.2f}")
        return ", ".join(parts)

    def counts(self) -> dict[str, Any]:
        """The same for programs, as plain values; `dropped` counts committed shards only, by
        reason."""
        done, total = self._bar()
        dropped = sum(report.dropped for report in self._reports.values())
        return {
            "step": self._step,
            "records": None if self._announced > 0 else total,
            "records_done": done,
            "shards": self._total,
            "shards_done": self._done,
            "shards_quarantined": self._quarantined,
            "records_to_go": None if self._announced > 0 else total - done,
            "records_per_second": self.records_per_second(),
            "seconds_to_go": None if self._announced > 0 else self._rate.to_go(total - done),
            "dropped": dict(sorted(self._dropped.items())),
            "dropped_in_hand": dropped,
            "gpu": self._gpu(),
            "cost": self.bill.amount,
        }

    def _records(self) -> int:
        """Records done by this run, including shards in progress."""
        return self._records_now + sum(report.done for report in self._reports.values())

    def _gpu(self) -> dict[str, Any] | None:
        """The GPUs of all workers: the fullest one's memory, and how busy they are on average."""
        reports = [report for report in self._reports.values() if report.gpu_total_bytes]
        if not reports:
            return None
        fullest = max(reports, key=lambda report: report.gpu_used_bytes or 0)
        busy = [report.gpu_busy for report in reports if report.gpu_busy is not None]
        return {
            "used_bytes": fullest.gpu_used_bytes,
            "total_bytes": fullest.gpu_total_bytes,
            "busy": sum(busy) / len(busy) if busy else None,
        }

    def _bar(self) -> tuple[int, int]:
        """Records done, and the known total."""
        in_hand = self._records() - self._records_now
        done = self._records_before + self._records_now
        return done + in_hand, done + self._to_go


class Throttle:
    """Passes on at most one message per interval, for work without shards to count."""

    def __init__(
        self,
        say: Callable[[str], None],
        every_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say, self._every_seconds, self._clock = say, every_seconds, clock
        self._said = clock()

    def __call__(self, message: str) -> None:
        if self._clock() - self._said >= self._every_seconds:
            self._said = self._clock()
            self._say(message)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`: with the precision of an estimate."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 36:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h"
