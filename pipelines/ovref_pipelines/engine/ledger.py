"""The state of one step: which shards remain, how often each failed, and which failed permanently.

A shard that repeatedly kills its worker probably holds a *poison record* that crashes a library. So
after `SUSPECT_DEATHS` deaths its records are run one by one, only to check whether the worker
survives. A record that kills its worker `CONVICTING_DEATHS` times is excluded from the shard as the
counted drop `crashed_worker`, and the shard has the same bytes as if the stage had dropped it.
`ovref build --retry-failed` makes such shards again once the cause is fixed.
"""

import json
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import cast

from ovref.errors import OvrefError, StorageError
from ovref.storage.commits import Commit
from ovref.storage.steps import StepFolder
from ovref_pipelines.engine.config import EngineConfig
from ovref_pipelines.engine.progress import Progress
from ovref_pipelines.errors import JobError

QUARANTINE = "_quarantine"
"""Folder of a step: `<shard>.json` for each shard that failed permanently."""
CRASHED = "_crashed"
"""Folder of a step: `<shard>.json` for each shard with records that kill their worker."""
CRASHED_WORKER = "crashed_worker"
"""Reason of the drop of such a record."""
SUSPECT_DEATHS = 2
"""Number of worker deaths after which a shard's records are run one by one."""
CONVICTING_DEATHS = 2
"""Number of deaths after which a record is excluded: a single one may be chance."""
MAX_WORKER_DEATHS = 3
"""Number of worker deaths, after the examination of its records and without loss of the node, after
which a shard is quarantined."""
MAX_NODE_LOSSES = 20
"""Number of node losses that a shard may have; on spot machines they rarely come from the shard."""


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """Work for a worker. Plain data, sent to it."""

    shard: str
    attempt: int
    """Number of earlier attempts at the shard."""
    without: tuple[int, ...] = ()
    """Numbers of its records, from 0, to drop without processing."""
    examine: int | None = None
    """Run only the record of this number, and commit nothing."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one task on one worker: exactly one of the four. Plain data."""

    commit: Commit | None = None
    error: str | None = None
    """Traceback of an application error."""
    fatal: OvrefError | None = None
    outlived: bool | None = None
    """Result of an examination: False if the shard has no record of that number."""


@dataclass
class _Examination:
    """Which records of a shard kill their worker."""

    number: int = 0
    """Number of the next record to run."""
    deaths: int = 0
    """Number of workers that died while they ran this record alone."""
    over: bool = False


@dataclass
class Ledger:
    """The remaining shards of a step, and the failures of each so far."""

    records: dict[str, int]
    """The shards to do, in the order to hand them out, and how many records each has."""
    target: StepFolder
    config: EngineConfig
    progress: Progress
    committed_now: int = 0
    quarantined: list[str] = field(default_factory=list)
    tallies: Counter[str] = field(default_factory=Counter)
    """Failures in this run: `errors`, `worker_deaths`, `start_deaths` (workers that died
    while they loaded their models), `node_losses`, `crashed_records`."""

    def __post_init__(self) -> None:
        self.waiting = deque(self.records)
        self._tries: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._worker_deaths: Counter[str] = Counter()
        self._node_losses: Counter[str] = Counter()
        self._examinations: dict[str, _Examination] = {}
        self._crashed: dict[str, dict[int, str]] = {}
        self._reported_before = {
            path for folder in (QUARANTINE, CRASHED) for path in self.target.store.list(folder)
        }

    def add(self, shard: str, records: int) -> None:
        """Adds a shard that the previous step has just committed."""
        if shard not in self.records:
            self.records[shard] = records
            self.waiting.append(shard)
            self.progress.more(records)

    def take(self) -> ShardTask:
        """The next task; `waiting` must not be empty."""
        shard = self.waiting.popleft()
        examination = self._examinations.get(shard)
        if examination is not None and not examination.over:
            return ShardTask(shard=shard, attempt=self._tries[shard], examine=examination.number)
        self._tries[shard] += 1
        without = tuple(sorted(self._crashed.get(shard, ())))
        return ShardTask(shard=shard, attempt=self._tries[shard] - 1, without=without)

    def give_back(self, task: ShardTask) -> None:
        """Returns a task that no worker has started; it becomes the next one."""
        if task.examine is None:
            self._tries[task.shard] -= 1
        self.waiting.appendleft(task.shard)

    def settle(self, task: ShardTask, outcome: Outcome) -> None:
        """Records the result of a task.

        Raises:
            OvrefError: the fatal error, if that is the result.
            StorageError: the shard was committed to a place that cannot be seen from here.
            JobError: too many shards have failed.
        """
        shard = task.shard
        if outcome.fatal is not None:
            raise outcome.fatal
        if outcome.error is not None:
            self.progress.lost(shard)
            self._errors[shard] += 1
            self.count("errors")
            self._again(shard, self._errors[shard] < self.config.attempts, outcome.error)
            return
        if outcome.outlived is not None:
            self._next_suspect(shard, more=outcome.outlived)
            return
        commit = cast(Commit, outcome.commit)  # exactly one of the four is there
        # An object store looks the same from everywhere, so it is asked only once: requests are
        # slow, and workers would wait for this process.
        ask = self.target.store.is_local or not self.committed_now
        if ask and self.target.commit_of(shard) is None:
            raise StorageError(
                f"a worker has committed shard {shard} to {self.target.store.url}, but it is not "
                "there for this process: workers and driver need one place that all of them see, "
                "a shared folder or an object store"
            )
        self.committed_now += 1
        dropped = Counter(commit.dropped) + Counter(commit.dropped_parts)
        self.progress.finished(shard, self.records[shard], dropped, commit.outputs)
        for path in (f"{QUARANTINE}/{shard}.json", f"{CRASHED}/{shard}.json"):
            if path in self._reported_before and not (shard in self._crashed and CRASHED in path):
                self.target.store.delete(path)

    def worker_lost(self, task: ShardTask, reason: str, node_lost: bool) -> None:
        """Records that a worker died or was killed before it finished its task."""
        shard = task.shard
        self.progress.lost(shard)
        if node_lost:
            self.count("node_losses")
            self._node_losses[shard] += 1
            self._again(shard, self._node_losses[shard] < MAX_NODE_LOSSES, reason)
            return
        self.count("worker_deaths")
        if task.examine is not None:
            self._suspect_died(shard, reason)
            return
        self._worker_deaths[shard] += 1
        if self._worker_deaths[shard] == SUSPECT_DEATHS and shard not in self._examinations:
            self._examinations[shard] = _Examination()
            self._worker_deaths[shard] = 0
            self.progress.say(
                f"shard {shard} has killed {SUSPECT_DEATHS} workers; its records are run one by "
                f"one to find which does: {_last_line(reason)}",
                event="examine", shard=shard,
            )  # fmt: skip
            self.waiting.append(shard)
            return
        self._again(shard, self._worker_deaths[shard] < MAX_WORKER_DEATHS, reason)

    def _suspect_died(self, shard: str, reason: str) -> None:
        examination = self._examinations[shard]
        examination.deaths += 1
        if examination.deaths < CONVICTING_DEATHS:
            self.waiting.appendleft(shard)
            return
        crashed = self._crashed.setdefault(shard, {})
        crashed[examination.number] = reason
        self.count("crashed_records")
        self.progress.say(
            f"record {examination.number} of shard {shard} kills its worker even alone; it is "
            f"dropped as {CRASHED_WORKER}: {_last_line(reason)}",
            event="crashed_record", shard=shard, record=examination.number,
        )  # fmt: skip
        # Written before the shard can be committed, so that every drop has a reason.
        self._tell(
            f"{CRASHED}/{shard}.json",
            {
                "shard": shard,
                "records": [{"number": n, "reason": text} for n, text in sorted(crashed.items())],
            },
        )
        self._give_up_if_too_many(reason)
        self._next_suspect(shard, more=True)

    def _next_suspect(self, shard: str, *, more: bool) -> None:
        examination = self._examinations[shard]
        examination.number += 1
        examination.deaths, examination.over = 0, not more
        if not more and shard not in self._crashed:
            self.progress.say(f"no record of shard {shard} kills its worker when run alone")
        self.waiting.appendleft(shard)

    def _again(self, shard: str, again: bool, reason: str) -> None:
        if again:
            self.progress.say(
                f"shard {shard} will be tried again: {_last_line(reason)}",
                event="retry", shard=shard,
            )  # fmt: skip
            # Retried last: the cause may have passed by then.
            self.waiting.append(shard)
            return
        self.quarantined.append(shard)
        self.progress.quarantined(shard, self.records[shard])
        self.progress.say(
            f"shard {shard} is quarantined: {_last_line(reason)}", event="quarantine", shard=shard
        )
        record = {"shard": shard, "tries": self._tries[shard], "reason": reason}
        self._tell(f"{QUARANTINE}/{shard}.json", record)
        self._give_up_if_too_many(reason)

    def _give_up_if_too_many(self, reason: str) -> None:
        crashed = sum(len(numbers) for numbers in self._crashed.values())
        if len(self.quarantined) + crashed <= self.config.max_quarantined:
            return
        also = f" and {crashed} records" if crashed else ""
        raise JobError(
            f"{len(self.quarantined)} shards{also} of {self.target.name} failed permanently, more "
            f"than max_quarantined={self.config.max_quarantined}; the last because of: "
            f"{_last_line(reason)}; all reasons are in {self.target.store.url}, in {QUARANTINE} "
            f"and {CRASHED}"
        )

    def count(self, what: str) -> None:
        """Counts one of `tallies`."""
        self.tallies[what] += 1
        self.progress.failed(what)

    def _tell(self, path: str, record: dict[str, object]) -> None:
        data = json.dumps(record, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace")
        self.target.store.write(path, data)


def _last_line(reason: str) -> str:
    return reason.strip().rpartition("\n")[2]
