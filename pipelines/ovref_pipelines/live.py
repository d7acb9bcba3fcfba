"""`progress.json` in a build's output: the current state of the build, for other processes.

The driver of the build rewrites it every few seconds, so `ovref status`, the explorer and other
programs can read it from any machine.
"""

import contextlib
import datetime
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ovref.errors import OvrefError
from ovref.storage.file_store import Store
from ovref_pipelines.engine.progress import duration

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"
EVERY_SECONDS = 3.0
"""Interval between writes to a local folder."""
EVERY_SECONDS_REMOTE = 15.0
"""Interval between writes to an object store, which charges for each."""
STALE_SECONDS = 60.0
"""Age of the last update after which a running build counts as dead."""


class Live:
    """Writes `progress.json`. `watch` is the `Watcher` of the build's steps; any thread may call
    it, and none waits for another's write."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock = store, clock
        self._every = EVERY_SECONDS if store.is_local else EVERY_SECONDS_REMOTE
        self._due = clock()
        self._writing = threading.Lock()
        self._state: dict[str, Any] = {
            "state": "running", "started": _now(), "doing": "", "cost": None, "steps": {},
        }  # fmt: skip

    def message(self, text: str) -> None:
        """Sets what the build is doing, in words."""
        self._state["doing"] = text
        self._write()

    def watch(self, steps: list[dict[str, Any]]) -> None:
        """Where steps stand, as `Progress.counts` gives it."""
        known = self._state["steps"] | {counts["step"]: counts for counts in steps}
        cost = steps[-1]["cost"] if steps else self._state["cost"]
        self._state = self._state | {"steps": known, "cost": cost}
        self._write()

    @contextlib.contextmanager
    def during(self) -> Iterator[None]:
        """Records at the end whether the block is `done` or has `ended` early, and why."""
        try:
            yield
        except BaseException as error:
            self._state |= {"state": "ended", "doing": f"{type(error).__name__}: {error}"}
            self._write(now=True)
            raise
        self._state |= {"state": "done"}
        self._write(now=True)

    def _write(self, *, now: bool = False) -> None:
        if not now and self._clock() < self._due:
            return
        if not self._writing.acquire(blocking=now):
            return
        try:
            tree = self._state | {"time": _now()}
            data = (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode()
            self._store.write(PROGRESS, data)
        except (OvrefError, OSError) as error:  # a failed update must not stop the build
            logger.warning("%s/%s cannot be written: %s", self._store.url, PROGRESS, error)
        finally:
            self._due = self._clock() + self._every
            self._writing.release()


def read(store: Store) -> dict[str, Any] | None:
    """The content of `progress.json`, with `age_seconds`; None if there is none.

    A build that is `running` but has not updated the file for a minute is `gone`.
    """
    content = store.read_if_there(PROGRESS)
    if content is None:
        return None
    try:
        tree = dict(json.loads(content))
        then = datetime.datetime.fromisoformat(tree["time"])
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("%s/%s is damaged: %s", store.url, PROGRESS, error)
        return None
    age = (datetime.datetime.now(datetime.UTC) - then).total_seconds()
    if tree["state"] == "running" and age > STALE_SECONDS:
        tree["state"] = "gone"
    return tree | {"age_seconds": round(age, 1)}


def text(now: dict[str, Any]) -> str:
    """The progress of a build in words, from the result of `read`: its running steps, or what it is
    doing."""
    unfinished = [
        f"{name} {step['records_done']} of {step['records'] or '?'} records"
        + (f", {duration(step['seconds_to_go'])} to go" if step["seconds_to_go"] else "")
        for name, step in now["steps"].items()
        if step["records"] != step["records_done"]
    ]
    return "; ".join(unfinished) or now["doing"]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
