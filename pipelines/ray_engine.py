"""Runs the shards of a step on Ray actors. Only `submit` imports ray besides.

Actors are built from the specs and hold the models; the driver gives each one shard at a time and
waits for any of them. Ray's own retries are off: the driver knows what a lost worker had in hand,
gives that shard to another worker and hires a replacement, so that attempts are counted in one
place. Images never travel: an actor reads its shard from the store and commits it there.
"""

import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ovref_pipelines.engine import ShardWorker, thread_variables
from ovref_pipelines.engine_config import EngineConfig
from ovref_pipelines.ledger import JobError, Ledger, Outcome
from ovref_pipelines.stopping import Drain, StoppedError
from ray.exceptions import RayError, RayTaskError

from ovref.contract import Spec
from ovref.errors import ConfigError, ModelError, OvrefError
from ovref.storage.steps import StepFolder

POLL_SECONDS = 0.5
MAX_START_DEATHS = 3
"""Workers that may die one after another while they load their models, before the job gives up."""
START_ATTEMPTS = 3
"""Ray gives its processes half a minute to start, which a busy machine may not keep."""
OBJECT_STORE_BYTES = 80 << 20
"""Of a Ray of our own: only names of shards and counts pass through it."""


@dataclass
class Call:
    """What an actor has been asked to do."""

    actor: Any
    shard: str | None
    """None while it loads its models."""
    node: str | None
    """Ray's id of the node it runs on; None until it has answered once."""
    started: float
    """`time.monotonic()`."""


class Worker:
    """The actor. Its constructor does nothing, so that errors of loading arrive whole."""

    def load(self, specs: Sequence[Spec], threads: int) -> tuple[str, OvrefError | None]:
        """Builds the stages; the node's id, and why it failed if it did."""
        node = ray.get_runtime_context().get_node_id()
        try:
            self._worker = ShardWorker(specs, threads)
        except OvrefError as error:
            return node, error
        return node, None

    def run(self, source: StepFolder, target: StepFolder, shard: str, attempt: int) -> Outcome:
        """One shard."""
        return self._worker.run(source, target, shard, attempt)


def join(config: EngineConfig) -> None:
    """Joins a cluster or starts one, unless this process is in one already.

    Raises:
        ConfigError: there is no cluster at the address, or the GPUs asked for can never be had.
    """
    if not ray.is_initialized():
        handler = signal.getsignal(signal.SIGTERM)
        try:
            _start(config)
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # Ray puts its own there
    _check_resources(config)


def _start(config: EngineConfig) -> None:
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    own: dict[str, Any] = {}
    if address == "local":
        # What Ray calls a CPU is a number to count with: as many as the workers ask for.
        own = {
            "num_cpus": max(1, math.ceil(config.workers * config.cpus_per_worker)),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        try:  # for Ray itself would try for many minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise ConfigError(f"cannot join Ray at {address}: {error}") from error
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
            return
        except Exception as error:  # that is what Ray raises where it takes too long to start
            ray.shutdown()
            if not own or attempt == START_ATTEMPTS:
                what = "start Ray here" if own else f"join Ray at {address}"
                raise ConfigError(f"cannot {what}: {error}") from error


def run(
    specs: Sequence[Spec],
    source: StepFolder,
    target: StepFolder,
    config: EngineConfig,
    ledger: Ledger,
    drain: Drain,
) -> None:
    """Runs the ledger's shards to the end, or until a drain is over. Raises like `run_step`."""
    calls: dict[Any, Call] = {}
    try:
        _drive(specs, source, target, config, ledger, drain, calls)
    finally:
        for call in calls.values():
            ray.kill(call.actor)


def _drive(
    specs: Sequence[Spec],
    source: StepFolder,
    target: StepFolder,
    config: EngineConfig,
    ledger: Ledger,
    drain: Drain,
    calls: dict[Any, Call],
) -> None:
    progress = ledger.progress
    hire = ray.remote(Worker).options(**_actor_options(config)).remote
    start_deaths, anyone_ready, waiting_since = 0, False, time.monotonic()
    while True:
        if not drain.requested:
            # No more workers than shards: one for each that waits, besides those at work.
            loading = sum(call.shard is None for call in calls.values())
            for _ in range(min(config.workers - len(calls), len(ledger.waiting) - loading)):
                actor = hire()
                ref = actor.load.remote(list(specs), config.threads)
                calls[ref] = Call(actor, None, None, time.monotonic())
        elif _drained(calls, config, drain):
            return
        if not calls:
            return

        ready, _ = ray.wait(list(calls), num_returns=1, timeout=POLL_SECONDS)
        progress.tick()
        for ref in ready:
            call = calls.pop(ref)
            try:
                answer = ray.get(ref)
            except RayTaskError as error:  # not the shard: the worker cannot even be called
                raise ModelError(f"a worker cannot take its orders: {error.cause!r}") from error
            except RayError as error:
                ray.kill(call.actor)
                if call.shard is None:
                    start_deaths += 1
                    _complain_of_start(start_deaths, error, progress)
                else:
                    _book_loss(ledger, call, _first_line(error))
                continue
            if call.shard is None:
                node, error = answer
                if error is not None:
                    raise error
                if not anyone_ready:
                    progress.working(config.workers)
                call.node, start_deaths, anyone_ready = node, 0, True
            else:
                ledger.settle(call.shard, answer)
                if answer.error is not None:
                    # An error of CUDA spoils its process for every later shard: take a new one.
                    ray.kill(call.actor)
                    continue
            if ledger.waiting and not drain.requested:
                _give(calls, call, source, target, ledger)
            else:
                ray.kill(call.actor)

        _replace_hung(calls, config, ledger)
        if not anyone_ready and time.monotonic() - waiting_since > 30:
            waiting_since = time.monotonic()
            progress.say(f"no worker is ready yet; {_need(config)}, the cluster has {_offer()}")


def _give(
    calls: dict[Any, Call], idle: Call, source: StepFolder, target: StepFolder, ledger: Ledger
) -> None:
    shard, attempt = ledger.take()
    ref = idle.actor.run.remote(source, target, shard, attempt)
    calls[ref] = Call(idle.actor, shard, idle.node, time.monotonic())


def _drained(calls: dict[Any, Call], config: EngineConfig, drain: Drain) -> bool:
    """Lets go of workers without a shard; whether none, or no time, is left."""
    for ref in [ref for ref, call in calls.items() if call.shard is None]:
        ray.kill(calls.pop(ref).actor)
    if calls and time.monotonic() - drain.requested_at > config.drain_seconds:
        raise StoppedError(f"abandoned {len(calls)} shards after {config.drain_seconds:g} s")
    return not calls


def _replace_hung(calls: dict[Any, Call], config: EngineConfig, ledger: Ledger) -> None:
    now = time.monotonic()
    for ref, call in list(calls.items()):
        if call.shard is not None and now - call.started > config.shard_timeout_seconds:
            del calls[ref]
            ray.kill(call.actor)
            reason = f"it took longer than shard_timeout_seconds={config.shard_timeout_seconds:g}"
            ledger.worker_lost(call.shard, reason, node_lost=False)


def _book_loss(ledger: Ledger, call: Call, reason: str) -> None:
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    node_lost = call.node not in alive
    what = "its node was lost" if node_lost else "its worker died"
    ledger.worker_lost(call.shard, f"{what}: {reason}", node_lost)


def _complain_of_start(deaths: int, error: RayError, progress: Any) -> None:
    reason = _first_line(error)
    if deaths > MAX_START_DEATHS:
        raise JobError(
            f"{deaths} workers in a row died while they loaded their models (out of memory? see "
            f"Ray's logs); the last: {reason}"
        )
    progress.say(f"a worker died while it loaded its models, hiring another: {reason}")


def _first_line(error: RayError) -> str:
    """Ray's errors run over many lines of ids; the last sentence says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:200] if lines else 'no details'}"


def _actor_options(config: EngineConfig) -> dict[str, Any]:
    return {
        "num_cpus": config.cpus_per_worker,
        "num_gpus": config.gpus_per_worker,
        "max_restarts": 0,
        "max_task_retries": 0,
        "scheduling_strategy": "SPREAD",
        "runtime_env": {"env_vars": thread_variables(config.threads)},
    }


def _check_resources(config: EngineConfig) -> None:
    """A cluster may grow, a Ray of our own never does: there a wish too large waits for ever."""
    if config.address is not None or os.environ.get("RAY_ADDRESS"):
        return
    found = ray.cluster_resources()
    gpus = found.get("GPU", 0)
    if config.gpus_per_worker > gpus:
        raise ConfigError(
            f"gpus_per_worker={config.gpus_per_worker:g}, but Ray finds {gpus:g} GPUs here; lower "
            "it, or give the address of a cluster that has them"
        )


def _need(config: EngineConfig) -> str:
    return f"each needs {config.cpus_per_worker:g} CPU and {config.gpus_per_worker:g} GPU"


def _offer() -> str:
    found = ray.cluster_resources()
    return f"{found.get('CPU', 0):g} CPU and {found.get('GPU', 0):g} GPU in all"
