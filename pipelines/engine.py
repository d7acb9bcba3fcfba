"""Runs one step: the missing shards of its source through a chain of stages, on some workers.

Whatever the engine, a shard is run by `ShardWorker` and accounted for by `Ledger`; `engine=local`
does so in this process, `engine=ray` on actors (`ray_engine`). The committed shards are the whole
state: a step that was stopped in any way goes on where it was when it is run again.

What can go wrong, and what is done about it:

- *fatal* (a model that cannot be loaded, a full disk, a foreign folder): the job ends at once;
- *application error* (a stage raised): the shard is tried again, `attempts` times in all;
- *infrastructure error* (worker or node gone, shard out of time): the shard is given to another
  worker, a bounded number of times;
- a shard that fails for good is *quarantined*: its traceback is kept in
  `<step>/_quarantine/<shard>.json`, the job goes on, says so at the end and fails. The next run
  tries it again.
"""

import importlib
import json
import os
import secrets
import signal
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from ovref_pipelines.progress import Progress

from ovref.config import STRICT
from ovref.contract import Spec
from ovref.errors import ConfigError, MismatchError, ModelError, OvrefError, StorageError
from ovref.run_shard import run_shard
from ovref.storage.steps import Commit, StepFolder

FATAL = (ConfigError, MismatchError, ModelError, StorageError)
"""Trying another shard would end the same way."""

QUARANTINE = "_quarantine"
MAX_WORKER_DEATHS = 3
"""Times a shard may take its worker down while the node lives on: then it is a poison shard."""
MAX_NODE_LOSSES = 20
"""Times a shard may lose its node, which on spot machines is seldom the shard's fault."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Where shards run. Nothing here changes a byte of the output."""

    __pydantic_config__ = STRICT

    engine: Literal["local", "ray"] = "local"
    """`local` runs shards in this process, `ray` on the actors of a Ray cluster."""
    workers: int = 1
    """Ray actors, each with all models of a step and one shard in flight; 1 with `local`."""
    address: str | None = None
    """Of a running Ray cluster, `auto` for this machine's; None takes $RAY_ADDRESS or else starts
    a Ray for this job alone."""
    cpus_per_worker: float = 1.0
    """CPU cores that Ray sets aside for a worker."""
    gpus_per_worker: float = 0.0
    """GPUs that Ray sets aside for a worker; a fraction shares one."""
    threads: int = 1
    """Threads of numeric libraries in a worker. More threads may add in another order."""
    attempts: int = 2
    """Times a shard may raise before it is quarantined."""
    max_quarantined: int = 20
    """The job gives up when more shards of a step than this were quarantined."""
    shard_timeout_seconds: float = 7200.0
    """After which the worker of a shard counts as hung and is replaced (`ray` only)."""
    drain_seconds: float = 60.0
    """How long shards in flight may take after SIGTERM or Ctrl-C before they are abandoned (`ray`
    only; `local` finishes its shard)."""
    progress_seconds: float = 10.0
    """Between two lines of progress where the output is not a terminal."""

    def __post_init__(self) -> None:
        for name in ("workers", "threads", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.engine == "local" and self.workers != 1:
            raise ValueError(
                "workers must be 1 with engine=local, which is this process, found "
                f"{self.workers}; set engine to ray for more"
            )
        for name in ("max_quarantined", "cpus_per_worker", "gpus_per_worker", "drain_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, found {getattr(self, name)}")
        for name in ("shard_timeout_seconds", "progress_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be more than 0, found {getattr(self, name)}")
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(
                f"gpus_per_worker above 1 must be a whole number, found {self.gpus_per_worker}"
            )


class StoppedError(Exception):
    """The job was asked to stop; what is committed stays."""


class JobError(OvrefError):
    """Too many shards or workers failed for the job to go on."""


@dataclass(frozen=True, kw_only=True)
class StepSummary:
    """What a step's folder holds after a run."""

    step: str
    output: str
    """URL of the step's folder."""
    shards: int
    """Of its source."""
    committed: int
    committed_now: int
    """By this run."""
    inputs: int
    """Records, over all committed shards, like the counts below."""
    outputs: int
    dropped: dict[str, int]
    """Whole records given up, by reason."""
    dropped_parts: dict[str, int]
    """Regions given up, by reason."""
    quarantined: tuple[str, ...]
    """Shards that failed for good in this run."""
    seconds: float
    """Of this run, wall clock."""
    work_seconds: float
    """Spent inside shards by all workers of all runs."""


def run_step(
    specs: Sequence[Spec],
    source: StepFolder,
    target: StepFolder,
    config: EngineConfig,
    progress: Progress | None = None,
) -> StepSummary:
    """Runs every committed shard of `source` that `target` lacks; declares `target` complete.

    Raises:
        ConfigError: the workers can never get the CPUs or GPUs that they ask for.
        ModelError, StorageError, MismatchError: nothing more can be done until it is mended.
        JobError: more shards than `max_quarantined`, or workers that keep dying at the start.
        StoppedError: SIGTERM or SIGINT came; in-flight shards were finished or abandoned.
    """
    started = time.monotonic()
    progress = progress or Progress(target.name, every_seconds=config.progress_seconds)
    sources, done = source.commits(), set(target.committed())
    records = {shard: sources[shard].outputs for shard in sources if shard not in done}
    ledger = Ledger(records, target, config, progress)
    progress.begin(len(sources), len(sources) - len(records), sum(records.values()), config.workers)
    try:
        if records and config.engine == "local":
            with draining(progress) as drain:
                _run_local(specs, source, target, config, ledger, drain)
        elif records:
            ray_engine = _ray_engine(config)
            ray_engine.join(config)
            with draining(progress) as drain:
                ray_engine.run(specs, source, target, config, ledger, drain)
    finally:
        progress.close()
    everything = source.complete()
    if everything is not None and set(everything) <= set(target.committed()):
        target.finish(everything)
    return summarise(
        target,
        len(sources),
        committed_now=ledger.committed_now,
        quarantined=tuple(sorted(ledger.quarantined)),
        seconds=time.monotonic() - started,
    )


def summarise(
    target: StepFolder,
    shards: int,
    *,
    committed_now: int = 0,
    quarantined: tuple[str, ...] = (),
    seconds: float = 0.0,
) -> StepSummary:
    """Adds up the markers of a step whose source has `shards`."""
    commits = list(target.commits().values())
    dropped: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    for commit in commits:
        dropped.update(commit.dropped)
        parts.update(commit.dropped_parts)
    return StepSummary(
        step=target.name,
        output=target.store.url,
        shards=shards,
        committed=len(commits),
        committed_now=committed_now,
        inputs=sum(commit.inputs for commit in commits),
        outputs=sum(commit.outputs for commit in commits),
        dropped=dict(sorted(dropped.items())),
        dropped_parts=dict(sorted(parts.items())),
        quarantined=quarantined,
        seconds=round(seconds, 3),
        work_seconds=round(sum(commit.seconds for commit in commits), 3),
    )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one shard on one worker: exactly one of the three. Plain data, to travel."""

    commit: Commit | None = None
    error: str | None = None
    """Traceback of an application error."""
    fatal: OvrefError | None = None


class ShardWorker:
    """The built stages of a step, ready for one shard after another."""

    def __init__(self, specs: Sequence[Spec], threads: int) -> None:
        """Loads the models. Raises ModelError, also for anything unforeseen."""
        limit_threads(threads)
        self._stages = []
        for spec in specs:
            try:
                self._stages.append(spec.build())
            except OvrefError:
                raise
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                raise ModelError(
                    f"stage {spec.name} cannot be built: {type(error).__name__}: {error} "
                    f"({last.filename}:{last.lineno})"
                ) from error

    def run(self, source: StepFolder, target: StepFolder, shard: str, attempt: int) -> Outcome:
        """Runs one shard and never raises for what the shard or its stages do."""
        try:
            return Outcome(commit=run_shard(self._stages, source, target, shard, attempt))
        except FATAL as error:
            return Outcome(fatal=error)
        except Exception:
            return Outcome(error=traceback.format_exc())


def limit_threads(threads: int) -> None:
    """Bounds the threads of libraries loaded from now on, and of torch also if it is loaded."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


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
        """Books what came of a shard. Raises the fatal error, if that is what came."""
        if outcome.fatal is not None:
            raise outcome.fatal
        if outcome.error is not None:
            self._errors[shard] += 1
            self._again(shard, self._errors[shard] < self.config.attempts, outcome.error)
            return
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


@dataclass
class Drain:
    """Whether the job was asked to stop."""

    requested_at: float | None = None
    """`time.monotonic()` of the first signal."""

    @property
    def requested(self) -> bool:
        return self.requested_at is not None


@contextmanager
def draining(progress: Progress) -> Iterator[Drain]:
    """Turns the first SIGTERM or SIGINT into a request to stop, the second into StoppedError."""
    drain = Drain()
    if threading.current_thread() is not threading.main_thread():
        yield drain  # signals belong to the main thread
        return

    def on_signal(number: int, _frame: Any) -> None:
        if drain.requested:
            raise StoppedError(f"stopped by a second {signal.Signals(number).name}")
        drain.requested_at = time.monotonic()
        progress.say(
            f"{signal.Signals(number).name}: finishing the shards in hand; "
            "once more abandons them, and nothing committed is lost either way"
        )

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield drain
        if drain.requested:
            raise StoppedError("stopped as asked")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ray_left_as_found() -> Iterator[None]:
    """Ends the Ray that steps inside the block have started or joined, and no other.

    `run_step` starts Ray only when it has shards to run, and leaves it to the next step.
    """
    before = _ray_runs()
    try:
        yield
    finally:
        if not before and _ray_runs():
            sys.modules["ray"].shutdown()


def _ray_runs() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _run_local(
    specs: Sequence[Spec],
    source: StepFolder,
    target: StepFolder,
    config: EngineConfig,
    ledger: Ledger,
    drain: Drain,
) -> None:
    worker = ShardWorker(specs, config.threads)
    ledger.progress.working(1)
    while ledger.waiting and not drain.requested:
        shard, attempt = ledger.take()
        ledger.settle(shard, worker.run(source, target, shard, attempt))


def _ray_engine(config: EngineConfig) -> Any:
    """The module that imports ray, only when it is wanted.

    A Ray of our own gets a secret token through the environment, which Ray reads while it is
    imported: its ports are then closed to others, and nothing is written into the home folder.
    """
    own = config.address is None and "RAY_ADDRESS" not in os.environ
    if own and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return importlib.import_module("ovref_pipelines.ray_engine")
