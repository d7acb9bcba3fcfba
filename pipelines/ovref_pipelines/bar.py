"""Progress over many items: a bar in a terminal, a line every few seconds elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ovref.meter import ProgressMeter

EVERY_SECONDS = 10.0


@contextmanager
def bar(what: str, total: int, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Gives a function to call after each item; shows the count, the rate and the time to go.

    Args:
        what: what is counted, for people: `images`.
        say: gets the lines where stderr is no terminal.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as ToGo

        speed = TextColumn("{task.fields[rate]}")
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), speed, ToGo())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(what, total=total, rate="")

            def step() -> None:
                speed_now = progress.tasks[0].speed
                rate = f"{speed_now:.2f} {what}/s" if speed_now else ""
                progress.update(task, advance=1, rate=rate)

            yield step
        return
    meter = ProgressMeter(total, what, say, EVERY_SECONDS)
    done = 0

    def line() -> None:
        nonlocal done
        done += 1
        if done == 1:  # before it, models were loaded
            meter.begin(1)
        elif done < total:
            meter.count()

    yield line
