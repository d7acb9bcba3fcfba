"""How a phase spreads its work: as lists of tasks that somebody runs.

A task is a call without arguments (a `functools.partial` of a module's function), picklable, that
reads and writes files under the work folder and returns plain values. It may be run anywhere that
folder is seen, in any order, and again after a failure: it writes under a name of its own and its
bytes depend on its arguments alone. So all ways to run a list give the same collection.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

Task = Callable[[], Any]
RunTasks = Callable[[Sequence[Task]], Iterator[Any]]
"""Runs tasks and gives their results in the order of the list, each as soon as it and those before
it are there."""


def in_process(tasks: Sequence[Task]) -> Iterator[Any]:
    """Runs tasks one after another, here."""
    for task in tasks:
        yield task()
