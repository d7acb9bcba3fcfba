"""Progress bars on a terminal, and the progress of a loop over items."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from ovref.meter import ProgressMeter

EVERY_SECONDS = 10.0
"""Interval between lines of progress where stderr is not a terminal."""
REDRAW_SECONDS = 0.2
"""Interval between updates of a bar on a terminal."""


class Bars:
    """Bars on a terminal, one below the other, each with a line of text; gone once closed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown: Any = None

    def show(self, states: Sequence[tuple[str, int, int]]) -> None:
        """Draws a bar for each (text, items done, items in total)."""
        if self._shown is None:
            from rich import console, progress, table  # only a terminal needs it

            one_line = table.Column(no_wrap=True)
            self._shown = progress.Progress(
                progress.BarColumn(bar_width=20),
                progress.TextColumn("{task.description}", markup=False, table_column=one_line),
                progress.TimeElapsedColumn(),
                console=console.Console(file=self._stream),
                refresh_per_second=2,
                transient=True,
            )
            self._shown.start()
        for number, (text, done, total) in enumerate(states):
            if number == len(self._shown.task_ids):
                self._shown.add_task(text, total=total)
            task = self._shown.task_ids[number]
            self._shown.update(task, description=text, completed=done, total=total)

    def print(self, line: str) -> None:
        """Prints a line, above the bars if there are any."""
        if self._shown is None:
            print(line, file=self._stream, flush=True)
        else:
            self._shown.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Removes the bars from the terminal. Idempotent."""
        if self._shown is not None:
            self._shown.stop()
            self._shown = None


@contextmanager
def bar(what: str, total: int, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Yields a function to call after each item; shows the count, the rate and the time to go.

    On a terminal this is a bar, elsewhere a line every few seconds.

    Args:
        what: plural noun for the items, as in `images`.
        say: called with each line if stderr is not a terminal.
    """
    bars = Bars(sys.stderr)
    live = sys.stderr.isatty()
    done = 0

    def draw(line: str) -> None:
        bars.show([(line, done, total)])

    if live:
        draw(f"0 of {total} {what}")
    meter = ProgressMeter(total, what, *((draw, REDRAW_SECONDS) if live else (say, EVERY_SECONDS)))

    def step() -> None:
        nonlocal done
        done += 1
        if done == 1:  # models were loaded before it, so the rate is measured from here
            meter.begin(1)
        elif done < total:
            meter.count()

    try:
        yield step
    finally:
        bars.close()
