"""The actors that `ray.engine` drives, and what the driver knows of each."""

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


class Worker:
    """The actor. Its constructor does nothing, so that errors of loading arrive whole."""

    def where(self) -> str:
        """Ray's id of the node on which it has got its place."""
        return ray.get_runtime_context().get_node_id()

    def load(
        self, chains: list[tuple[Sequence[Spec], StepFolder, StepFolder]], threads: int
    ) -> OvrefError | None:
        """Builds the stages of each step; why it failed if it did.

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

    def run(self, step: int, task: ShardTask, upcoming: str | None) -> tuple[Outcome, int]:
        """One task of one of its steps; and its resident memory afterwards, bytes."""
        worker, source, target = self._steps[step]
        outcome = worker.run(source, target, task, upcoming)
        return outcome, self._process.memory_info().rss


@dataclass(eq=False)
class WorkerHandle:
    """A worker as the driver knows it."""

    actor: Any
    pool: "Pool"
    node: str | None = None
    """Ray's id of the node it runs on; None while it waits for a place."""
    hired_among: frozenset[str] = frozenset()
    """The nodes that were there when it was hired."""
    reserved: ShardTask | None = None
    """A task of the pool's first step whose shard is fetched ahead, to be given to it next."""


@dataclass
class PendingCall:
    """What a worker has been asked to do."""

    handle: WorkerHandle
    started: float
    """`time.monotonic()`."""
    run: StepRun | None = None
    """None while it waits for a place and while it loads its models."""
    task: ShardTask | None = None


@dataclass(eq=False)
class Pool:
    """Equal workers, each with the models of one step or of several."""

    runs: list[StepRun]
    """In the order of the flow."""
    config: PoolConfig
    calls: dict[Any, PendingCall] = field(default_factory=dict)
    idle: list[WorkerHandle] = field(default_factory=list)
    """They have their models and nothing to do yet."""
    start_deaths: int = 0
    """Workers in a row that died before they had loaded their models."""
    anyone_ready: bool = False

    @property
    def loading(self) -> int:
        """Workers that do not have their models yet, with those that wait for a place."""
        return sum(call.run is None for call in self.calls.values())

    def handles(self) -> list[WorkerHandle]:
        """All workers, those at work first."""
        return [*(call.handle for call in self.calls.values()), *self.idle]

    def at_work(self, run: StepRun) -> int:
        """The number of shards of a step that its workers have."""
        return sum(call.run is run for call in self.calls.values())
