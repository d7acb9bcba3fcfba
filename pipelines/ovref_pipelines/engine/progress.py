"""Progress of a running step: shards done, records per second, remaining time.

On a terminal a bar for each step, drawn by rich, with `line()` beside it; elsewhere (a log, a
cluster job) `line()` at intervals; for programs the same as one JSON object per line (`json_line`).
The rate is that of the last few shards of this run, so there is no estimate before the first one is
finished. A `Meter` exports the counts to a metrics system.

Whoever runs a step calls `begin` once, then `finished`, `set_aside`, `more` and `failed` as things
happen, `tick` often and `close` at the end. All three outputs come from `line`, `_counts` and the
share done that `_bar` gives, so a finer count needs a change there and nowhere else.
"""

import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Protocol, TextIO

from ovref_pipelines.console import json_line

RECENT_SHARDS = 20
"""The rate is measured over this many of the latest shards (and at least two per worker)."""


class Meter(Protocol):
    """Receives the counts of a step as well."""

    def finished(self, inputs: int, outputs: int, dropped: dict[str, int]) -> None:
        """A shard is committed."""

    def failed(self, what: str) -> None:
        """One of `Ledger.tallies` has grown."""

    def stands(self, shards_waiting: int, workers: int, records_per_second: float) -> None:
        """Current state of the step."""


class Progress:
    """Counts one step's shards and prints its progress."""

    def __init__(
        self,
        step: str,
        *,
        every_seconds: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        log: str = "text",
        meter: Meter | None = None,
    ) -> None:
        """`stream` defaults to stderr; `clock` is monotonic, in seconds; `log` is
        `text` or `json`."""
        self._step = step
        self._every_seconds = every_seconds
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._json = log == "json"
        self._live = self._stream.isatty() and not self._json
        self._meter = meter
        self._shown: list[Progress] = [self]
        self._leader = self
        self._total = self._done = self._to_go = self._set_aside = 0
        self._announced = 0
        self._dropped: Counter[str] = Counter()
        self._recent: deque[tuple[float, int]] = deque([(clock(), 0)], maxlen=RECENT_SHARDS + 1)
        self._printed = clock()
        self._bars: Any = None

    def begin(self, total: int, done: int, records_to_go: int, workers: int) -> None:
        """`done` of `total` shards were finished by earlier runs; the rest hold the records."""
        self._total, self._done, self._to_go = total, done, records_to_go
        self.working(workers)
        if done < total:
            self.say(f"{total - done} of {total} shards to do, {records_to_go} records")

    def meter_to(self, meter: Meter) -> None:
        """Sends counts to `meter` from now on."""
        self._meter = meter

    def beside(self, other: "Progress") -> None:
        """Shows `other`, of a concurrent step, together with this one."""
        self._leader._shown.append(other)
        other._leader = self._leader

    def still_to_come(self, shards: int) -> None:
        """The previous step still has this many shards to make; `more` adds each. Until then the
        number of records is unknown, and there is no estimate."""
        self._announced = shards

    def more(self, inputs: int) -> None:
        """A shard of `inputs` records was added."""
        self._to_go += inputs
        self._announced -= 1

    def working(self, workers: int) -> None:
        """The first worker has loaded its models: rates are measured from here."""
        span = max(RECENT_SHARDS, 2 * workers) + 1
        self._recent = deque([(self._clock(), 0)], maxlen=span)

    def finished(self, inputs: int, dropped: dict[str, int], outputs: int = 0) -> None:
        """One shard of `inputs` records is committed, with drops counted by reason."""
        self._done += 1
        self._to_go -= inputs
        self._dropped.update(dropped)
        self._recent.append((self._clock(), inputs))
        if self._meter is not None:
            self._meter.finished(inputs, outputs, dropped)
        if self._done < self._total:
            self.tick()

    def set_aside(self, inputs: int) -> None:
        """One shard of `inputs` records is quarantined."""
        self._set_aside += 1
        self._to_go -= inputs

    def failed(self, what: str) -> None:
        """Counts an event that has a tally: a retry, a lost worker."""
        if self._meter is not None:
            self._meter.failed(what)

    def stands(self, shards_waiting: int, workers: int) -> None:
        """For the meter: unassigned shards, and workers with loaded models."""
        if self._meter is not None:
            self._meter.stands(shards_waiting, workers, self.records_per_second() or 0.0)

    def tick(self) -> None:
        """Prints if the interval has passed; call it often."""
        if self._leader is not self:
            self._leader.tick()
            return
        now = self._clock()
        if now - self._printed < (0.2 if self._live else self._every_seconds):
            return
        self._printed = now
        if self._live:
            self._draw()
        elif self._json:
            for progress in self._shown:
                line = progress.line()
                self._print(json_line(progress._step, "progress", line, progress._counts()))
        else:
            self._print("; ".join(progress.line() for progress in self._shown))

    def say(self, message: str, event: str = "note", **fields: Any) -> None:
        """Prints a separate line: a failed shard, a lost worker.

        Args:
            event: what kind of message it is, for programs; with `fields` about it.
        """
        line = f"{self._step}: {message}"
        self._leader._print(json_line(self._step, event, message, fields) if self._json else line)

    def close(self) -> None:
        """Removes the bars from the terminal."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def records_per_second(self) -> float | None:
        """Input records a second over the recent shards; None before the first is finished."""
        if len(self._recent) < 2:
            return None
        seconds = self._clock() - self._recent[0][0]
        # The first entry only starts the window: its records were done before it.
        return sum(count for _, count in list(self._recent)[1:]) / seconds if seconds > 0 else None

    def line(self) -> str:
        """Current state of the step."""
        rate = self.records_per_second()
        parts = [f"{self._step}: {self._done}/{self._total} shards"]
        if rate:
            parts.append(f"{rate:.3g} records/s")
            if self._announced <= 0:
                parts.append(f"{duration(self._to_go / rate)} to go")
        elif self._announced <= 0:
            parts.append("time to go unknown until a shard is finished")
        if self._dropped:
            parts.append(f"{sum(self._dropped.values())} drops")
        if self._set_aside:
            parts.append(f"{self._set_aside} quarantined")
        return ", ".join(parts)

    def _counts(self) -> dict[str, Any]:
        return {
            "shards": self._total,
            "shards_done": self._done,
            "shards_quarantined": self._set_aside,
            "records_to_go": None if self._announced > 0 else self._to_go,
            "records_per_second": self.records_per_second(),
            "dropped": dict(sorted(self._dropped.items())),
        }

    def _bar(self) -> tuple[int, int]:
        """How much is done, and of how much."""
        return self._done, self._total

    def _draw(self) -> None:
        if self._bars is None:
            from rich import console, progress, table  # only a terminal needs it

            one_line = table.Column(no_wrap=True)
            self._bars = progress.Progress(
                progress.BarColumn(bar_width=20),
                progress.TextColumn("{task.description}", markup=False, table_column=one_line),
                progress.TimeElapsedColumn(),
                console=console.Console(file=self._stream),
                refresh_per_second=2,
                transient=True,
            )
            self._bars.start()
        for number, step in enumerate(self._shown):
            done, total = step._bar()
            if number == len(self._bars.task_ids):
                self._bars.add_task(step.line(), total=total)
            task = self._bars.task_ids[number]
            self._bars.update(task, description=step.line(), completed=done, total=total)

    def _print(self, line: str) -> None:
        if self._bars is None:
            print(line, file=self._stream, flush=True)
        else:  # above the bars
            self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)


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
    """`45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`: as exact as an estimate is worth."""
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
