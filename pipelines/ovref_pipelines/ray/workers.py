"""The actors of `ray.engine`, and the driver's view of each."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import ray

from ovref.contract import Spec
from ovref.errors import OvrefError
from ovref.storage.steps import StepFolder
from ovref_pipelines.engine.config import PoolConfig
from ovref_pipelines.engine.ledger import Outcome, ShardTask
from ovref_pipelines.engine.run_steps import ShardWorker, StepRun
from ovref_pipelines.ray.reports import publisher


class Worker:
    """The actor. Its constructor does nothing, so that loading errors arrive unchanged."""

    def where(self) -> str:
        """Ray's id of the node that it runs on."""
        return ray.get_runtime_context().get_node_id()

    def load(
        self, chains: list[tuple[Sequence[Spec], StepFolder, StepFolder]], threads: int
    ) -> OvrefError | None:
        """Builds the stages of each step; returns the error, if any.

        Args:
            chains: the specs of each step, where it reads and where it writes.
        """
        self._process = psutil.Process()
        try:
            self._steps = [
                (ShardWorker(specs, threads), source, target) for specs, source, target in chains
            ]
        except OvrefError as error:
            return error
        return None

    def run(
        self, step: int, task: ShardTask, upcoming: str | None, channel: str
    ) -> tuple[Outcome, int]:
        """Runs one task of one of its steps; also returns the resident memory afterwards, bytes.

        Args:
            channel: see `WorkerHandle`.
        """
        worker, source, target = self._steps[step]
        outcome = worker.run(source, target, task, upcoming, publisher(channel, step))
        return outcome, self._process.memory_info().rss


@dataclass(eq=False)
class WorkerHandle:
    """The driver's view of a worker."""

    actor: Any
    pool: "Pool"
    node: str | None = None
    """Ray's id of the node it runs on; None while it waits for a place."""
    hired_among: frozenset[str] = frozenset()
    """The live nodes when it was started."""
    channel: str = field(default_factory=lambda: secrets.token_hex(8))
    """Where its reports are found (`ray.reports`)."""
    reserved: ShardTask | None = None
    """A task of the pool's first step whose shard it prefetches, to be given to it next."""


@dataclass
class PendingCall:
    """A pending call of a worker."""

    handle: WorkerHandle
    started: float
    """`time.monotonic()`."""
    run: StepRun | None = None
    """None while the worker waits for a place or loads its models."""
    task: ShardTask | None = None


@dataclass(eq=False)
class Pool:
    """Equal workers, each with the models of one step or of several."""

    runs: list[StepRun]
    """In the order of the flow."""
    config: PoolConfig
    calls: dict[Any, PendingCall] = field(default_factory=dict)
    idle: list[WorkerHandle] = field(default_factory=list)
    """Workers with loaded models and without a task."""
    start_deaths: int = 0
    """Number of consecutive workers that died before they had loaded their models."""
    anyone_ready: bool = False

    @property
    def loading(self) -> int:
        """Number of workers without models, including those that wait for a place."""
        return sum(call.run is None for call in self.calls.values())

    def handles(self) -> list[WorkerHandle]:
        """All workers, busy ones first."""
        return [*(call.handle for call in self.calls.values()), *self.idle]

    def at_work(self, run: StepRun) -> int:
        """Number of a step's shards that its workers are processing."""
        return sum(call.run is run for call in self.calls.values())
