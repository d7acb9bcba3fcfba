"""Runs one step: sends the missing shards of its source through a chain of stages, on workers.

Whatever the engine, a shard is run by `ShardWorker` and accounted for by `Ledger`; `engine=local`
does so in this process, `engine=ray` on actors (`ray.engine`). The committed shards are the whole
state, so a step that was stopped in any way resumes where it stopped.

Failures and their handling:

- *fatal* (a model that cannot be loaded, a full disk, a foreign folder): the job ends at once;
- *the store does not answer*: its client retries for some seconds, then the worker waits and
  retries the shard, for minutes;
- *application error* (a stage raised): the shard is retried, up to `attempts` attempts;
- *infrastructure error* (lost worker or node, timeout): another worker retries the shard, a bounded
  number of times; if a shard keeps killing workers, the record that does so is found and excluded
  (see `ledger`);
- a shard that fails permanently is *quarantined*: its traceback is stored in
  `<step>/_quarantine/<shard>.json`, and the job continues but fails at the end. The next run
  retries it.
"""

import contextlib
import importlib
import itertools
import logging
import os
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ovref.contract import Spec
from ovref.errors import ConfigError, MismatchError, ModelError, OvrefError, StorageError
from ovref.run_shard import run_alone, run_shard
from ovref.storage.commits import Commit
from ovref.storage.scratch import remove_abandoned
from ovref.storage.steps import StepFolder
from ovref_inference.errors import MissingPackageError
from ovref_pipelines.engine.bill import Bill
from ovref_pipelines.engine.config import EngineConfig, PoolConfig
from ovref_pipelines.engine.ledger import CRASHED_WORKER, Ledger, Outcome, ShardTask
from ovref_pipelines.engine.prefetch import Prefetch
from ovref_pipelines.engine.progress import Progress, Watcher
from ovref_pipelines.engine.reports import Report, reporting
from ovref_pipelines.engine.stopping import Drain, draining
from ovref_pipelines.engine.summary import StepSummary, summarise

FATAL = (ConfigError, MismatchError, MissingPackageError, ModelError, StorageError)
"""Errors that every other shard would raise too."""
OUTAGE_SECONDS = (5.0, 30.0, 120.0, 300.0)
"""Waiting times before retries if the store does not answer. Without them all shards would fail
permanently while an object store restarts."""

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class StepRun:
    """A step for `run_steps`, with its ledger."""

    specs: Sequence[Spec]
    source: StepFolder
    target: StepFolder
    pool: PoolConfig
    """Its pool of workers."""
    progress: Progress
    ledger: Ledger = field(init=False)
    shards: int = field(init=False)
    """Number of shards of its source so far."""


def run_step(
    specs: Sequence[Spec],
    source: StepFolder,
    target: StepFolder,
    config: EngineConfig,
    progress: Progress | None = None,
) -> StepSummary:
    """Runs one step. Like `run_steps`."""
    progress = progress or progress_of(target, config)
    run = StepRun(specs=specs, source=source, target=target, pool=config.pool, progress=progress)
    return run_steps([run], config)[0]


def run_steps(runs: Sequence[StepRun], config: EngineConfig) -> list[StepSummary]:
    """Runs every committed shard that a step's `target` lacks; declares `target` complete.

    Args:
        runs: one step; or steps that run at the same time, each reading what the one before it
            makes, with `placement` chained (on the workers of the first) or pools.

    Raises:
        ConfigError: the cluster can never provide the CPUs or GPUs that the workers need.
        ModelError, StorageError, MismatchError: an error that stops the whole step.
        JobError: more shards than `max_quarantined`, or workers that keep dying at the start.
        StoppedError: SIGTERM or SIGINT was received; shards in flight were finished or abandoned.
    """
    started = time.monotonic()
    to_come = 0
    for before, run in zip([None, *runs], runs, strict=False):
        sources, done = run.source.commits(), set(run.target.committed())
        # A complete step's list gives the order, which may differ from the sorted one.
        records = {
            shard: sources[shard].outputs
            for shard in run.source.complete() or sources
            if shard in sources and shard not in done
        }
        run.ledger = Ledger(records, run.target, config, run.progress)
        run.shards = len(sources)
        total = len(sources) + to_come
        run.progress.begin(
            total,
            len(sources) - len(records),
            sum(records.values()),
            run.pool.workers,
            records_done=sum(sources[shard].outputs for shard in sources if shard in done),
        )
        run.progress.expect_shards(to_come)
        if before is not None:
            before.progress.show_with(run.progress)
        to_come += len(records)
    try:
        if to_come and config.engine == "local":
            for run, after in zip(runs, [*runs[1:], None], strict=True):
                with draining(run.progress) as drain:
                    _run_local(run, after, config, drain)
        elif to_come:
            ray_engine = ray_module(config, "engine")
            with draining(runs[0].progress) as drain:
                ray_engine.run(runs, config, drain)
    finally:
        for run in runs:
            run.progress.close()
    for run in runs:
        everything = run.source.complete()
        if everything is not None and set(everything) <= set(run.target.committed()):
            run.target.finish(everything)
    return [
        summarise(
            run.target,
            len(run.source.committed()),
            committed_now=run.ledger.committed_now,
            quarantined=tuple(sorted(run.ledger.quarantined)),
            trouble=dict(sorted(run.ledger.tallies.items())),
            seconds=time.monotonic() - started,
        )
        for run in runs
    ]


def progress_of(
    target: StepFolder,
    config: EngineConfig,
    bill: Bill | None = None,
    watcher: Watcher | None = None,
) -> Progress:
    """Progress display of a step, as configured."""
    return Progress(
        target.name,
        every_seconds=config.progress_seconds,
        log=config.log,
        bill=bill,
        watcher=watcher,
    )


class ShardWorker:
    """The built stages of a step; runs one shard after another."""

    def __init__(self, specs: Sequence[Spec], threads: int) -> None:
        """Loads the models. Raises ModelError, also for unexpected exceptions."""
        limit_threads(threads)
        remove_abandoned()
        self._prefetch = Prefetch()
        self._examined: tuple[str, int] | None = None
        self._committed = False
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

    def run(
        self,
        source: StepFolder,
        target: StepFolder,
        task: ShardTask,
        upcoming: str | None = None,
        send: Callable[[Report], None] | None = None,
    ) -> Outcome:
        """Runs one task; errors of the shard or its stages are returned, not raised.

        Args:
            upcoming: the shard that will probably be next, to prefetch.
            send: gets a `Report` every few seconds, from a separate thread.
        """
        try:
            if task.examine is not None:
                return Outcome(outlived=self._examine(source, task.shard, task.examine))
            without = dict.fromkeys(task.without, CRASHED_WORKER)
            with self._prefetch.place(source, task.shard) as place:
                if upcoming is not None:
                    self._prefetch.begin(source, upcoming)
                with reporting(send, task.shard) as watch:
                    commit = self._run_shard(place, target, task, without, watch)
            self._committed = True
            return Outcome(commit=commit)
        except FATAL as error:
            return Outcome(fatal=error)
        except Exception:
            return Outcome(error=traceback.format_exc())

    def _run_shard(
        self,
        source: StepFolder,
        target: StepFolder,
        task: ShardTask,
        without: dict[int, str],
        watch: Callable[[int, int], None],
    ) -> Commit:
        arguments = (self._stages, source, target, task.shard, task.attempt, without, watch)
        # A store that has never answered probably has a wrong address: report it at once.
        for wait_s in OUTAGE_SECONDS if self._committed else ():
            try:
                return run_shard(*arguments)
            except (ConnectionError, TimeoutError) as error:
                logger.warning("shard %s: %s; retrying in %g s", task.shard, error, wait_s)
                time.sleep(wait_s)
        return run_shard(*arguments)

    def close(self) -> None:
        """Removes prefetched files."""
        self._prefetch.drop()

    def _examine(self, source: StepFolder, shard: str, number: int) -> bool:
        """Runs one record alone; False if there is no record of that number."""
        if self._examined != (shard, number):
            self._records = itertools.islice(source.read(shard), number, None)
        self._examined = (shard, number + 1)
        for record in self._records:
            # Errors of stages are reported when the whole shard is run.
            with contextlib.suppress(Exception):
                run_alone(self._stages, record)
            return True
        return False


def thread_variables(threads: int) -> dict[str, str]:
    """Environment variables that limit the threads of numeric libraries loaded later.

    numpy always gets one thread: in a worker it multiplies only small matrices.
    """
    count = str(threads)
    return {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": "1"}


def worker_variables(threads: int, gpus: float) -> dict[str, str]:
    """Environment variables of a Ray worker that reserves this many GPUs."""
    variables = thread_variables(threads)
    if gpus == 0:
        # Ray hides GPUs from workers that reserved others, not from those without any.
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


def limit_threads(threads: int) -> None:
    """Limits the threads of libraries loaded from now on, and of torch if it is loaded already."""
    os.environ.update(thread_variables(threads))
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def ray_left_as_found() -> Iterator[None]:
    """Shuts down the Ray that steps inside the block have started or joined, and no other.

    Steps start Ray only if they have shards to run, and leave it running for the next step.
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


def settle(run: StepRun, after: StepRun | None, task: ShardTask, outcome: Outcome) -> None:
    """Records an outcome; a committed shard is added to the following step."""
    run.ledger.settle(task, outcome)
    if outcome.commit is not None and after is not None:
        after.ledger.add(task.shard, outcome.commit.outputs)


def _run_local(run: StepRun, after: StepRun | None, config: EngineConfig, drain: Drain) -> None:
    if not run.ledger.waiting:
        return
    worker = ShardWorker(run.specs, config.threads)
    run.progress.working(1)
    run.progress.bill.holds(1, run.pool.gpus_per_worker)
    try:
        while run.ledger.waiting and not drain.requested:
            task = run.ledger.take()
            upcoming = run.ledger.waiting[0] if run.ledger.waiting else None
            send = run.progress.report
            settle(run, after, task, worker.run(run.source, run.target, task, upcoming, send))
    finally:
        run.progress.bill.holds(0, 0)
        worker.close()


def ray_module(config: EngineConfig, name: str) -> Any:
    """Imports a module of the package `ray`, which is above this one and imports ray, on demand.

    Our own Ray gets a secret token through the environment, which Ray reads on import: its ports
    are then closed to others, and nothing is written into the home folder.
    """
    own = config.address is None and "RAY_ADDRESS" not in os.environ
    if own and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return importlib.import_module(f"ovref_pipelines.ray.{name}")
