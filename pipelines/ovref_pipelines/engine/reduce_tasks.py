"""Runs the tasks of a reduction (`ovref.reduce.phases`) here, or on Ray if that is the engine."""

from collections.abc import Iterator, Sequence
from typing import Any

from ovref.reduce.phases import RunTasks, Task, in_process
from ovref.storage.file_store import Store
from ovref_pipelines.engine.config import EngineConfig
from ovref_pipelines.engine.run_steps import ray_module

FEW = 2
"""Number of tasks for which Ray is not started: a small collection has one per embedding."""


def spread(config: EngineConfig, place: Store, *, shared: bool) -> RunTasks:
    """How to run the tasks that read and write at `place`.

    Args:
        shared: whether all machines of the cluster see it; otherwise tasks run concurrently on
            this machine.
    """
    if config.engine == "local":
        return in_process

    def run(tasks: Sequence[Task]) -> Iterator[Any]:
        if len(tasks) <= FEW:
            yield from in_process(tasks)
            return
        ray_tasks = ray_module(config, "tasks")
        yield from ray_tasks.run(tasks, config, place, shared=shared)

    return run
