"""The account of one step: which shards are left, which failed and how often, which for good."""

import json
from collections import Counter, deque
from dataclasses import dataclass, field

from ovref_pipelines.engine_config import EngineConfig
from ovref_pipelines.progress import Progress

from ovref.errors import OvrefError, StorageError
from ovref.storage.steps import Commit, StepFolder

QUARANTINE = "_quarantine"
MAX_WORKER_DEATHS = 3
"""Times a shard may take its worker down while the node lives on: then it is a poison shard."""
MAX_NODE_LOSSES = 20
"""Times a shard may lose its node, which on spot machines is seldom the shard's fault."""


class JobError(OvrefError):
    """Too many shards or workers failed for the job to go on."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one shard on one worker: exactly one of the three. Plain data, to travel."""

    commit: Commit | None = None
    error: str | None = None
    """Traceback of an application error."""
    fatal: OvrefError | None = None


@dataclass
class Ledger:
    """What is left of a step, and what went wrong with each shard so far."""

    records: dict[str, int]
    """The shards to do and how many records each has."""
    target: StepFolder
    config: EngineConfig
    progress: Progress
    committed_now: int = 0
    quarantined: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.waiting = deque(sorted(self.records))
        self._tries: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._worker_deaths: Counter[str] = Counter()
        self._node_losses: Counter[str] = Counter()
        self._quarantined_before = set(self.target.store.list(QUARANTINE))

    def take(self) -> tuple[str, int]:
        """The next shard, and how often it was tried before."""
        shard = self.waiting.popleft()
        self._tries[shard] += 1
        return shard, self._tries[shard] - 1

    def settle(self, shard: str, outcome: Outcome) -> None:
        """Books what came of a shard.

        Raises:
            OvrefError: the fatal error, if that is what came.
            StorageError: the shard was committed to a place that cannot be seen from here.
            JobError: too many shards have failed.
        """
        if outcome.fatal is not None:
            raise outcome.fatal
        if outcome.error is not None:
            self._errors[shard] += 1
            self._again(shard, self._errors[shard] < self.config.attempts, outcome.error)
            return
        if self.target.commit_of(shard) is None:
            raise StorageError(
                f"a worker has committed shard {shard} to {self.target.store.url}, but it is not "
                "there for this process: workers and driver need one place that all of them see, "
                "a shared folder or an object store"
            )
        self.committed_now += 1
        dropped = Counter(outcome.commit.dropped) + Counter(outcome.commit.dropped_parts)
        self.progress.finished(self.records[shard], dropped)
        if (path := f"{QUARANTINE}/{shard}.json") in self._quarantined_before:
            self.target.store.delete(path)

    def worker_lost(self, shard: str, reason: str, node_lost: bool) -> None:
        """Books that a shard's worker died or was killed before the shard was committed."""
        count = self._node_losses if node_lost else self._worker_deaths
        count[shard] += 1
        limit = MAX_NODE_LOSSES if node_lost else MAX_WORKER_DEATHS
        self._again(shard, count[shard] < limit, reason)

    def _again(self, shard: str, again: bool, reason: str) -> None:
        last_line = reason.strip().rpartition("\n")[2]
        if again:
            self.progress.say(f"shard {shard} will be tried again: {last_line}")
            # At the end: what made it fail may have passed by then.
            self.waiting.append(shard)
            return
        self.quarantined.append(shard)
        self.progress.set_aside(self.records[shard])
        self.progress.say(f"shard {shard} is quarantined: {last_line}")
        record = {"shard": shard, "tries": self._tries[shard], "reason": reason}
        data = json.dumps(record, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace")
        self.target.store.write(f"{QUARANTINE}/{shard}.json", data)
        if len(self.quarantined) > self.config.max_quarantined:
            raise JobError(
                f"{len(self.quarantined)} shards of {self.target.name} failed for good, more than "
                f"max_quarantined={self.config.max_quarantined}; the last because of: {last_line}; "
                f"all tracebacks are in {self.target.store.url}/{QUARANTINE}"
            )
