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
import os
import secrets
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ovref_pipelines.engine_config import EngineConfig
from ovref_pipelines.ledger import Ledger, Outcome
from ovref_pipelines.progress import Progress
from ovref_pipelines.stopping import Drain, draining

from ovref.contract import Spec
from ovref.errors import ConfigError, MismatchError, ModelError, OvrefError, StorageError
from ovref.run_shard import run_shard
from ovref.storage.steps import StepFolder

FATAL = (ConfigError, MismatchError, ModelError, StorageError)
"""Trying another shard would end the same way."""


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


def thread_variables(threads: int) -> dict[str, str]:
    """What bounds the threads of numeric libraries that are loaded later.

    numpy gets one in any case: in a worker it only ever multiplies small matrices.
    """
    count = str(threads)
    return {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": "1"}


def limit_threads(threads: int) -> None:
    """Bounds the threads of libraries loaded from now on, and of torch also if it is loaded."""
    os.environ.update(thread_variables(threads))
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


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
