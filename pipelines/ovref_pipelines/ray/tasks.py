"""The tasks of a reduction as Ray tasks."""

import os
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ovref.errors import ModelError, StorageError
from ovref.reduce.phases import Task
from ovref.storage.file_store import Store
from ovref_pipelines.engine.config import EngineConfig, PoolConfig
from ovref_pipelines.engine.run_steps import limit_threads, thread_variables, worker_variables
from ovref_pipelines.ray.cluster import join


def run(
    tasks: Sequence[Task], config: EngineConfig, place: Store, *, shared: bool
) -> Iterator[Any]:
    """Yields results in the order of `tasks`, running `config.workers` at a time.

    A task whose worker dies is run again by Ray; one that raises ends the run.

    Raises:
        StorageError: a machine that runs a task cannot access `place`.
        Exception: whatever a task raises.
    """
    join(config)
    options: dict[str, Any] = {
        "num_cpus": config.cpus_per_worker,
        "scheduling_strategy": "SPREAD",
        "max_retries": config.attempts,
        "runtime_env": {"env_vars": thread_variables(1)},
    }
    limit = config.workers
    if not shared:
        # The driver's machine may offer no CPUs to Ray, as is recommended for a head.
        here = ray.get_runtime_context().get_node_id()
        options |= {
            "num_cpus": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False),
        }
        limit = min(limit, os.cpu_count() or 1)
    sign = f"seen-{secrets.token_hex(8)}"
    place.write(sign, b"")
    call = ray.remote(_call).options(**options)
    numbers: dict[Any, int] = {}
    results: dict[int, Any] = {}
    try:
        started = 0
        for number in range(len(tasks)):
            while number not in results:
                while len(numbers) < limit and started < len(tasks):
                    numbers[call.remote(tasks[started], place, sign)] = started
                    started += 1
                for ref in ray.wait(list(numbers))[0]:
                    results[numbers.pop(ref)] = _result(ref)
            yield results.pop(number)
    finally:
        # Running tasks are not cancelled: they end with the driver, and a reply that crosses a
        # cancellation aborts the driver silently (a check in Ray 2.60's task manager).
        if not numbers:
            place.delete(sign)


def run_each(
    calls: Sequence[tuple[Callable[[], Any], PoolConfig]], config: EngineConfig
) -> list[Any]:
    """Runs each call on a worker like those of its pool, in a process that ends with it, at most
    `config.workers` of them at a time.

    Returns:
        The results, in the order of `calls`.

    Raises:
        ModelError: a process died: its models need more memory than it has.
        Exception: whatever the first of the calls that fail raises; those after it are not started.
    """
    join(config)
    waiting: list[Any] = []
    results: list[Any] = []
    for call, pool in calls:
        while len(waiting) >= config.workers:
            results.append(_of_worker(waiting.pop(0)))
        waiting.append(_started(call, config, pool))
    return results + [_of_worker(ref) for ref in waiting]


def _started(call: Callable[[], Any], config: EngineConfig, pool: PoolConfig) -> Any:
    variables = worker_variables(config.threads, pool.gpus_per_worker)
    options = {
        "num_cpus": pool.cpus_per_worker,
        "num_gpus": pool.gpus_per_worker,
        "max_retries": 0,
        "runtime_env": {"env_vars": variables},
    }
    # Only the decorator takes `max_calls`, which ends the process after the call.
    return ray.remote(max_calls=1)(_apply).options(**options).remote(call)


def _of_worker(ref: Any) -> Any:
    try:
        return _result(ref)
    except RayError as error:
        raise ModelError(
            f"the worker that loaded the models died (out of memory? see Ray's logs): {error}"
        ) from error


def _apply(call: Callable[[], Any]) -> Any:
    return call()


def _call(task: Task, place: Store, sign: str) -> Any:
    if not place.exists(sign):
        raise StorageError(
            f"{socket.gethostname()} cannot access {place.url}: `work`, or the place of a "
            "partitioned collection, must be a folder that all machines of the cluster share, or "
            "an object store; omit `work` to reduce only on the driver's machine"
        )
    limit_threads(1)
    return task()


def _result(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except RayTaskError as error:
        raise error.cause from error
