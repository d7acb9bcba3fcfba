"""A training on workers of a Ray cluster, which form one `torch.distributed` group."""

import os
import socket
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError

from ovref.errors import OvrefError
from ovref.training.methods import Training
from ovref_pipelines.engine.config import EngineConfig
from ovref_pipelines.engine.run_steps import worker_variables
from ovref_pipelines.errors import JobError
from ovref_pipelines.ray.cluster import join

POLL_SECONDS = 2.0
"""Interval between polls of worker 0's output."""


class TrainingWorker:
    """The actor. It answers while it trains."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def address(self) -> tuple[str, int]:
        """Its machine's address, and a port that is free there."""
        with socket.socket() as one:
            one.bind(("", 0))
            return ray.util.get_node_ip_address(), one.getsockname()[1]

    def run(
        self, spec: Training, rank: int, workers: int, address: tuple[str, int]
    ) -> OvrefError | None:
        """Trains as one of several; returns an error that ovref raises on purpose."""
        from ovref.training.methods import module_of

        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(workers), "LOCAL_RANK": "0",
            "MASTER_ADDR": address[0], "MASTER_PORT": str(address[1]),
        }  # fmt: skip
        try:
            module_of(spec).run_as_worker(spec, self._lines.append)
        except OvrefError as error:
            return error
        return None

    def lines(self) -> list[str]:
        """Lines since the last call."""
        said, self._lines[:] = list(self._lines), []
        return said


def run(spec: Training, config: EngineConfig, say: Callable[[str], None]) -> None:
    """Trains on `config.workers` workers; where one dies, all begin again from the last checkpoint.

    Raises:
        JobError: workers died in each of `config.attempts` attempts.
        OvrefError: whatever the training raises.
    """
    join(config)
    for attempt in range(1, config.attempts + 1):
        try:
            _run_once(spec, config, say)
            return
        except RayActorError as error:
            if attempt == config.attempts:
                raise JobError(
                    f"a worker of the training died in each of {attempt} attempts: {error}. The "
                    "same command resumes"
                ) from error
            say("ovref: a worker died; resuming from the last checkpoint")


def _run_once(spec: Training, config: EngineConfig, say: Callable[[str], None]) -> None:
    options: dict[str, Any] = {
        "num_cpus": config.cpus_per_worker,
        "num_gpus": config.gpus_per_worker,
        "max_concurrency": 2,
        "runtime_env": {"env_vars": worker_variables(config.threads, config.gpus_per_worker)},
    }
    actor: Any = ray.remote(TrainingWorker).options(**options)
    workers = [actor.remote() for _ in range(config.workers)]
    try:
        address = ray.get(workers[0].address.remote())
        count = len(workers)
        waiting = [w.run.remote(spec, rank, count, address) for rank, w in enumerate(workers)]
        while waiting:
            done, waiting = ray.wait(waiting, timeout=POLL_SECONDS)
            errors = [error for error in ray.get(done) if error is not None]
            for line in ray.get(workers[0].lines.remote()):
                say(line)
            if errors:
                raise errors[0]
    finally:
        for one in workers:
            ray.kill(one)
