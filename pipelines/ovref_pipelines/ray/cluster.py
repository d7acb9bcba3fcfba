"""Joins or starts a Ray cluster, and reads the resources of its nodes."""

import logging
import math
import os
import signal
import socket
import threading
from typing import Any

import ray

from ovref.errors import ConfigError
from ovref_pipelines.engine.config import EngineConfig, PoolConfig

START_ATTEMPTS = 3
"""Ray gives its processes half a minute to start, which a busy machine may not keep."""
OBJECT_STORE_BYTES = 80 << 20
"""Object store of our own Ray: only names of shards and counts pass through it."""


def join(config: EngineConfig) -> None:
    """Joins a cluster or starts one, unless this process is in one already.

    Raises:
        ConfigError: there is no cluster at the address, or it can never provide the GPUs.
    """
    if not ray.is_initialized():
        handler = signal.getsignal(signal.SIGTERM)
        try:
            _start(config)
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # Ray installs its own handler
    _check_resources(config)


def living_nodes() -> set[str]:
    """Ray's ids of the live nodes."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def leaving_nodes() -> set[str]:
    """Ray's ids of draining nodes: preempted spot machines, a scale-down."""
    # As in Ray's own libraries (Train, Serve); there is no public API.
    return set(ray._private.state.state.get_draining_nodes())


def free_resources() -> dict[str, dict[str, float]]:
    """Ray's id of each node -> its free resources, a moment ago."""
    return ray._private.state.available_resources_per_node()


def node_with_room(small: PoolConfig, large: PoolConfig) -> str | None:
    """A node with room for a worker of `small` besides all workers of `large` that its free GPUs
    allow; None if there is none now."""
    alive = living_nodes() - leaving_nodes()
    for node, free in sorted(free_resources().items()):
        promised = free.get("GPU", 0) // large.gpus_per_worker * large.cpus_per_worker
        if node in alive and free.get("CPU", 0) - promised >= small.cpus_per_worker:
            return node
    return None


def need(pool: PoolConfig) -> str:
    """Resources of a worker, in words."""
    return f"each needs {pool.cpus_per_worker:g} CPU and {pool.gpus_per_worker:g} GPU"


def offer() -> str:
    """Resources of the cluster, in words."""
    found = ray.cluster_resources()
    return f"{found.get('CPU', 0):g} CPU and {found.get('GPU', 0):g} GPU in all"


def _start(config: EngineConfig) -> None:
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    own: dict[str, Any] = {}
    if address == "local":
        # Ray's CPUs are only a count: as many as the workers need.
        cpus = sum(pool.workers * pool.cpus_per_worker for pool in _pools(config))
        own = {
            "num_cpus": max(1, math.ceil(cpus)),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        try:  # because Ray itself would retry for many minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise ConfigError(f"cannot join Ray at {address}: {error}") from error
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
            return
        except Exception as error:  # raised by Ray if it takes too long to start
            ray.shutdown()
            if not own or attempt == START_ATTEMPTS:
                what = "start Ray here" if own else f"join Ray at {address}"
                raise ConfigError(f"cannot {what}: {error}") from error


def _pools(config: EngineConfig) -> list[PoolConfig]:
    return [config.pool] if config.placement != "pools" else [config.pool, config.embedders]


def _check_resources(config: EngineConfig) -> None:
    """A cluster may grow, but our own Ray does not: too large a request would wait forever."""
    if config.address is not None or os.environ.get("RAY_ADDRESS"):
        return
    found = ray.cluster_resources()
    gpus = found.get("GPU", 0)
    for pool in _pools(config):
        if pool.gpus_per_worker > gpus:
            raise ConfigError(
                f"gpus_per_worker={pool.gpus_per_worker:g}, but Ray finds {gpus:g} GPUs here; "
                "lower it, or give the address of a cluster that has them"
            )
