"""Restartable phases: each has a folder, which appears whole or not at all.

A phase writes into `<name>.partial` and ends by renaming it to `<name>`. So a folder that exists is
complete, and after a kill the next run repeats only the phase that was interrupted.

Phases spread their work as lists of tasks. A task is a call without arguments (a
`functools.partial` of a module's function), picklable, that reads and writes files under the work
folder and returns plain values. It may run wherever that folder is visible, in any order, and again
after a failure: it writes under a name of its own, and its bytes depend on its arguments alone. So
every way of running a list gives the same collection.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ovref.errors import StorageError

SUMMARY = "summary.json"
WAIT_SECONDS = 1.0
"""Between two looks at whether another process is done."""

Report = Callable[[str, int, int], None]
"""Called with the phase's name, the work done and the total work; for progress bars."""
Task = Callable[[], Any]
RunTasks = Callable[[Sequence[Task]], Iterator[Any]]
"""Runs tasks and yields their results in the order of the list, each as soon as it and those before
it are done."""


def in_process(tasks: Sequence[Task]) -> Iterator[Any]:
    """Runs tasks one after another in this process."""
    for task in tasks:
        yield task()


def run_phase(work: Path, name: str, phase: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """The summary of the phase `name`, run now unless it has been run before.

    Args:
        work: the folder of this reduction; another configuration has another folder.
        phase: gets an empty folder to write into and returns plain JSON values.
    """
    done = work / name
    if not done.exists():
        partial = work / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        summary = phase(partial)
        text = json.dumps(summary, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
        (partial / SUMMARY).write_text(text + "\n", encoding="utf-8")
        _sync_files(partial)
        os.replace(partial, done)
    return json.loads((done / SUMMARY).read_text(encoding="utf-8"))


@contextlib.contextmanager
def one_at_a_time(lock: Path, report: Report) -> Iterator[None]:
    """For the time of the block no other process is in a block with the same `lock`, a file.

    Two in one folder would take each other's unfinished phases away. A process that is killed
    holds nothing.

    Raises:
        StorageError: the file system has no locks.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(lock, "ab") as file:
            if _locked(file.fileno(), lock):
                try:
                    yield
                finally:
                    lock.unlink()
                return
        report("waiting for another process that makes the same collection", 0, 1)
        time.sleep(WAIT_SECONDS)


def _locked(descriptor: int, lock: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StorageError(
            f"{lock}: this file system has no locks ({error}), so two processes could damage "
            "each other's work there; choose a `work` folder on another one"
        ) from error
    # Whoever had it may have removed the file between its opening and now.
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(lock))
    except FileNotFoundError:
        return False


def _sync_files(folder: Path) -> None:
    """The rename must not reach the disk before the content does."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
