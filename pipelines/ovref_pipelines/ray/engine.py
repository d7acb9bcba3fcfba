"""Runs the shards of steps on Ray actors.

Actors are built from the specs and hold the models; the driver gives each one shard at a time and
waits for any of them. Ray's own retries are off: the driver gives the shard of a lost worker to
another one and starts a replacement, so that attempts are counted in one place. Images are not
sent: an actor reads its shard from the store and commits it there.

Several steps run concurrently in one pool of actors with the models of all of them
(`placement=chained`) or in a pool each (`pools`). Either way shards pass from step to step through
the store, so the bytes are those of steps that run one after another.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ovref.errors import ModelError
from ovref_pipelines.engine.config import EngineConfig
from ovref_pipelines.engine.ledger import ShardTask
from ovref_pipelines.engine.progress import Progress
from ovref_pipelines.engine.run_steps import StepRun, settle, worker_variables
from ovref_pipelines.engine.stopping import Drain
from ovref_pipelines.errors import JobError, StoppedError
from ovref_pipelines.ray.cluster import (
    join,
    leaving_nodes,
    living_nodes,
    need,
    node_with_room,
    offer,
)
from ovref_pipelines.ray.metrics import RayMeter
from ovref_pipelines.ray.reports import Reports, forget
from ovref_pipelines.ray.workers import PendingCall, Pool, Worker, WorkerHandle

POLL_SECONDS = 0.5
NOTICE_SECONDS = 2.0
"""Interval between checks for draining nodes and free resources."""
MAX_START_DEATHS = 3
"""Number of consecutive workers that may die while loading models before the job fails."""


def run(runs: Sequence[StepRun], config: EngineConfig, drain: Drain) -> None:
    """Runs all shards of the ledgers, or until the drain time is over; see `run_steps`."""
    join(config)
    for one in runs:
        one.progress.meter_to(RayMeter(one.target.name, one.target.store.url.rpartition("/")[0]))
    driver = _Driver(runs, config, drain)
    try:
        driver.drive()
    finally:
        driver.dismiss_all()


class _Driver:
    def __init__(self, runs: Sequence[StepRun], config: EngineConfig, drain: Drain) -> None:
        self._runs, self._config, self._drain = list(runs), config, drain
        if config.placement == "pools":
            self._pools = [Pool([one], one.pool) for one in runs]
        else:
            self._pools = [Pool(self._runs, runs[0].pool)]
        self._hire_class = ray.remote(Worker)
        self._say = runs[0].progress.say
        self._reports = Reports()
        self._leaving: set[str] = set()
        self._looked_at = self._waiting_since = time.monotonic()
        self._found_room_at = 0.0

    def drive(self) -> None:
        while True:
            if self._drain.requested:
                if self._drained():
                    return
            else:
                self._look_for_leaving_nodes()
                # Pools with GPUs first: CPUs are cheap, and a GPU without a CPU is idle.
                for pool in sorted(self._pools, key=lambda pool: -pool.config.gpus_per_worker):
                    self._hire(pool)
                    self._occupy(pool)
            # Housekeeping is done now, while all workers are busy.
            self._reports.read(self._at_work)
            self._pay()
            self._runs[0].progress.tick()
            for pool in self._pools:
                self._replace_hung(pool)
                for one in pool.runs:
                    ready_handles = len(pool.calls) - pool.loading + len(pool.idle)
                    one.progress.update_state(len(one.ledger.waiting), ready_handles)
            self._report_waiting()
            calls = {ref: pool for pool in self._pools for ref in pool.calls}
            if not calls:
                held = any(handle.reserved for pool in self._pools for handle in pool.idle)
                if not held and not any(one.ledger.waiting for one in self._runs):
                    return
                time.sleep(POLL_SECONDS)  # waiting for a place for a worker
            else:
                ready, _ = ray.wait(list(calls), num_returns=1, timeout=POLL_SECONDS)
                for ref in ready:
                    self._answered(calls[ref], ref)

    def dismiss_all(self) -> None:
        for pool in self._pools:
            for handle in pool.handles():
                ray.kill(handle.actor)
                forget(handle.channel, len(pool.runs))
            pool.idle.clear()
            pool.calls.clear()
        self._runs[0].progress.bill.holds(0, 0)

    # -- workers -------------------------------------------------------------------------------

    def _hire(self, pool: Pool) -> None:
        """At most one worker for each waiting shard, besides the busy ones."""
        spare = pool.loading + len(pool.idle)
        wanted = sum(len(one.ledger.waiting) for one in pool.runs) - spare
        free = pool.config.workers - len(pool.calls) - len(pool.idle)
        for _ in range(min(free, wanted)):
            strategy: Any = "SPREAD"
            if (greater := self._starvable(pool)) is not None:
                # The list of free resources is a moment old, so workers are placed one at a time.
                if time.monotonic() - self._found_room_at < NOTICE_SECONDS:
                    return
                node = node_with_room(pool.config, greater.config)
                if node is None:
                    return
                strategy = NodeAffinitySchedulingStrategy(node, soft=False)
                self._found_room_at = time.monotonic()
            variables = worker_variables(self._config.threads, pool.config.gpus_per_worker)
            options = {
                "num_cpus": pool.config.cpus_per_worker,
                "num_gpus": pool.config.gpus_per_worker,
                "max_restarts": 0,
                "max_task_retries": 0,
                "scheduling_strategy": strategy,
                "runtime_env": {"env_vars": variables},
            }
            actor: Any = self._hire_class.options(**options).remote()
            among = frozenset(living_nodes() - self._leaving)
            handle = WorkerHandle(actor, pool, hired_among=among)
            pool.calls[actor.where.remote()] = PendingCall(handle, time.monotonic())

    def _starvable(self, pool: Pool) -> Pool | None:
        """A pool with GPUs that might wait forever for CPUs that this one would take."""
        for other in self._pools:
            if other.config.gpus_per_worker > pool.config.gpus_per_worker == 0 and other.loading:
                return other
        return None

    def _occupy(self, pool: Pool) -> None:
        """Gives tasks to idle workers, and dismisses those that will get none."""
        for handle in list(pool.idle):
            pool.idle.remove(handle)
            if handle.node in self._leaving:
                self._dismiss(handle)
            elif (found := self._next_for(handle)) is not None:
                self._give(handle, *found)
            elif handle.reserved or self._more_may_come(pool):
                pool.idle.append(handle)
            else:
                self._dismiss(handle)
        if not self._more_may_come(pool):
            self._dismiss_loading(pool)

    def _next_for(self, handle: WorkerHandle) -> tuple[StepRun, ShardTask] | None:
        # The last step first, so that started work is finished and little waits in between.
        for one in reversed(handle.pool.runs):
            if self._queue_is_full(handle.pool, one):
                continue
            if one is handle.pool.runs[0]:
                for holder in (handle, *handle.pool.handles()):
                    # Otherwise a task reserved for a busy worker: better now than later.
                    if holder.reserved and (holder is handle or not one.ledger.waiting):
                        task, holder.reserved = holder.reserved, None
                        return one, task
            if one.ledger.waiting:
                return one, one.ledger.take()
        return None

    def _queue_is_full(self, pool: Pool, one: StepRun) -> bool:
        after = self._after(one)
        if after is None or after in pool.runs:
            return False
        return len(after.ledger.waiting) >= self._config.queue

    def _more_may_come(self, pool: Pool) -> bool:
        """Whether the pool's steps may still get more shards."""
        earlier = self._runs[: self._runs.index(pool.runs[-1])]
        return (
            any(one.ledger.waiting for one in pool.runs)
            or any(handle.reserved for handle in pool.handles())
            or any(
                one.ledger.waiting or other.at_work(one) or any(h.reserved for h in other.handles())
                for one in earlier
                for other in self._pools
            )
        )

    def _after(self, one: StepRun) -> StepRun | None:
        place = self._runs.index(one) + 1
        return self._runs[place] if place < len(self._runs) else None

    def _give(self, handle: WorkerHandle, one: StepRun, task: ShardTask) -> None:
        step = handle.pool.runs.index(one)
        first = one is handle.pool.runs[0]
        if first and handle.reserved is None and self._worth_fetching_ahead(one):
            handle.reserved = one.ledger.take()
            if handle.reserved.examine is not None:
                one.ledger.give_back(handle.reserved)
                handle.reserved = None
        upcoming = handle.reserved.shard if first and handle.reserved else None
        ref = handle.actor.run.remote(step, task, upcoming, handle.channel)
        handle.pool.calls[ref] = PendingCall(handle, time.monotonic(), one, task)

    def _worth_fetching_ahead(self, one: StepRun) -> bool:
        """Whether shards are remote, and there are enough of them for every worker."""
        enough = len(one.ledger.waiting) > sum(pool.config.workers for pool in self._pools)
        return enough and not one.source.store.is_local

    def _at_work(self) -> Iterator[tuple[str, int, str, Progress]]:
        for pool in self._pools:
            for call in pool.calls.values():
                if call.run is not None and call.task is not None and call.task.examine is None:
                    step = pool.runs.index(call.run)
                    yield call.handle.channel, step, call.task.shard, call.run.progress

    def _pay(self) -> None:
        """Updates the bill with the held workers: those with a place, also while they load
        models."""
        held = [
            (sum(handle.node is not None for handle in pool.handles()), pool.config.gpus_per_worker)
            for pool in self._pools
        ]
        workers, gpus = sum(count for count, _ in held), sum(count * each for count, each in held)
        self._runs[0].progress.bill.holds(workers, gpus)

    def _dismiss(self, handle: WorkerHandle) -> None:
        ray.kill(handle.actor)
        forget(handle.channel, len(handle.pool.runs))
        if handle.reserved is not None:
            handle.pool.runs[0].ledger.give_back(handle.reserved)
            handle.reserved = None

    def _dismiss_loading(self, pool: Pool) -> None:
        """Also workers without models, some of which may wait for a place in vain."""
        for ref in [ref for ref, call in pool.calls.items() if call.run is None]:
            self._dismiss(pool.calls.pop(ref).handle)

    # -- answers -------------------------------------------------------------------------------

    def _answered(self, pool: Pool, ref: Any) -> None:
        call = pool.calls.pop(ref)
        try:
            answer = ray.get(ref)
        except RayTaskError as error:  # not the shard's fault: the worker cannot even be called
            raise ModelError(f"a worker cannot take its tasks: {error.cause!r}") from error
        except RayError as error:
            self._dismiss(call.handle)
            if call.run is None or call.task is None:
                # A worker without a place may have been on a node that has been lost since.
                among = {call.handle.node} if call.handle.node else call.handle.hired_among
                node_lost = not among <= living_nodes() - leaving_nodes()
                self._start_failed(pool, _first_line(error), node_lost=node_lost)
            else:
                reason, node_lost = _loss(call, error)
                call.run.ledger.worker_lost(call.task, reason, node_lost)
            return
        if call.run is None or call.task is None:
            self._started(pool, call.handle, answer)
            return
        outcome, rss_bytes = answer
        settle(call.run, self._after(call.run), call.task, outcome)
        if outcome.error is not None:
            # A CUDA error breaks the process for every later shard: replace it.
            self._dismiss(call.handle)
        elif self._config.max_worker_gb and rss_bytes > self._config.max_worker_gb * 1e9:
            call.run.progress.say(
                f"a worker has grown to {rss_bytes / 1e9:.3g} GB, more than max_worker_gb="
                f"{self._config.max_worker_gb:g}; it is replaced",
                event="recycle", rss_bytes=rss_bytes,
            )  # fmt: skip
            self._dismiss(call.handle)
        else:
            pool.idle.append(call.handle)

    def _started(self, pool: Pool, handle: WorkerHandle, answer: Any) -> None:
        """Handles a worker that got its place and must load its models, or that has loaded them."""
        if handle.node is None:
            handle.node = answer
            chains = [(one.specs, one.source, one.target) for one in pool.runs]
            ref = handle.actor.load.remote(chains, self._config.threads)
            pool.calls[ref] = PendingCall(handle, time.monotonic())
            return
        if answer is not None:
            raise answer
        if not pool.anyone_ready:
            for one in pool.runs:
                one.progress.working(pool.config.workers)
        pool.start_deaths, pool.anyone_ready = 0, True
        pool.idle.append(handle)

    def _drained(self) -> bool:
        """Dismisses workers without a shard; returns whether no worker or no time is left."""
        left = 0
        for pool in self._pools:
            self._dismiss_loading(pool)
            for handle in pool.idle:
                self._dismiss(handle)
            pool.idle.clear()
            left += len(pool.calls)
        patience = self._config.drain_seconds
        asked_at = self._drain.requested_at or time.monotonic()
        if left and time.monotonic() - asked_at > patience:
            raise StoppedError(f"abandoned {left} shards after {patience:g} s")
        return not left

    def _replace_hung(self, pool: Pool) -> None:
        now, limit = time.monotonic(), self._config.shard_timeout_seconds
        for ref, call in list(pool.calls.items()):
            # No time limit for a place: machines come when the cloud has some.
            if call.handle.node is None or now - call.started <= limit:
                continue
            del pool.calls[ref]
            self._dismiss(call.handle)
            reason = f"it took longer than shard_timeout_seconds={limit:g}"
            if call.run is None or call.task is None:
                self._start_failed(pool, reason, node_lost=False)
            else:
                call.run.ledger.worker_lost(call.task, reason, node_lost=False)

    def _look_for_leaving_nodes(self) -> None:
        """Handles preemption notices: workers there finish their shard and get no other."""
        if time.monotonic() - self._looked_at < NOTICE_SECONDS:
            return
        self._looked_at = time.monotonic()
        found = leaving_nodes()
        handles = [call.handle for pool in self._pools for call in pool.calls.values()]
        for node in found - self._leaving:
            there = [handle for handle in handles if handle.node == node]
            if there:
                self._say(
                    f"node {node[:12]} is about to be lost: its {len(there)} workers finish their "
                    "current shards and get no others",
                    event="node_leaving", node=node,
                )  # fmt: skip
        self._leaving = found
        for handle in handles:
            if handle.node in found and handle.reserved is not None:
                handle.pool.runs[0].ledger.give_back(handle.reserved)
                handle.reserved = None

    def _start_failed(self, pool: Pool, reason: str, *, node_lost: bool) -> None:
        """Records a worker that was lost before it had loaded its models."""
        pool.runs[0].ledger.count("node_losses" if node_lost else "start_deaths")
        pool.start_deaths += not node_lost
        if pool.start_deaths > MAX_START_DEATHS:
            raise JobError(
                f"{pool.start_deaths} workers in a row died while they loaded their models (out of "
                f"memory? see Ray's logs); the last: {reason}"
            )
        self._say(f"a worker died while it loaded its models, hiring another: {reason}")

    def _report_waiting(self) -> None:
        if time.monotonic() - self._waiting_since <= 30:
            return
        self._waiting_since = time.monotonic()
        for pool in self._pools:
            if not pool.anyone_ready and any(one.ledger.waiting for one in pool.runs):
                self._say(f"no worker is ready yet; {need(pool.config)}, the cluster has {offer()}")


def _loss(call: PendingCall, error: RayError) -> tuple[str, bool]:
    """Why a worker was lost, and whether its node was lost with it."""
    # A lost node counts as alive for a while; its actors are unavailable, not dead.
    unavailable = isinstance(error, ActorUnavailableError)
    node_lost = unavailable or call.handle.node not in living_nodes()
    what = "its node was lost" if node_lost else "its worker died"
    return f"{what}: {_first_line(error)}", node_lost


def _first_line(error: RayError) -> str:
    """The last sentence of a Ray error, which says what happened after many lines of ids; the
    output of the process itself is in its log."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = f"{type(error).__name__}: {lines[-1][:200] if lines else 'no details'}"
    ids = dict(line.split(": ", 1) for line in lines if line.startswith(("pid: ", "ip: ")))
    if len(ids) < 2:
        return message
    return f"{message} (its stderr: worker-*-{ids['pid']}.err in Ray's logs on {ids['ip']})"
