"""Settings of where shards run."""

from dataclasses import dataclass, field
from typing import Literal

from ovref.config import STRICT
from ovref_inference.ranges import require_above, require_at_least


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """A pool of equal workers."""

    __pydantic_config__ = STRICT

    workers: int = 1
    """Ray actors, each with one shard in flight."""
    cpus_per_worker: float = 1.0
    """CPU cores that Ray reserves for a worker."""
    gpus_per_worker: float = 0.0
    """GPUs that Ray reserves for a worker; a fraction shares one, and 0 uses the CPU even if
    there is a GPU."""

    def __post_init__(self) -> None:
        require_at_least("workers", self.workers, 1)
        for name in ("cpus_per_worker", "gpus_per_worker"):
            require_at_least(name, getattr(self, name), 0)
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(
                f"gpus_per_worker above 1 must be a whole number, found {self.gpus_per_worker}"
            )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Where shards run. Only `threads` can change a byte of the output."""

    __pydantic_config__ = STRICT

    engine: Literal["local", "ray"] = "ray"
    """`ray` runs shards on the actors of a Ray cluster, `local` in this process."""
    workers: int = 1
    """Ray actors, each with all models of a step and one shard in flight; 1 with `local`."""
    address: str | None = None
    """Address of a running Ray cluster, `auto` for this machine's; None takes $RAY_ADDRESS, or
    starts a Ray for this job."""
    cpus_per_worker: float = 1.0
    """CPU cores that Ray reserves for a worker."""
    gpus_per_worker: float = 0.0
    """GPUs that Ray reserves for a worker; a fraction shares one, and 0 uses the CPU even if
    there is a GPU."""
    placement: Literal["steps", "chained", "pools"] = "steps"
    """How images and references share the workers. `steps`: all images first, then all references.
    `chained`: each worker holds the models of both and embeds the images that it has just made.
    `pools`: `embedders` embed while the `workers` make images. The last two need `ray`; the bytes
    are the same."""
    embedders: PoolConfig = field(default_factory=PoolConfig)
    """The workers that make references with `placement=pools`."""
    queue: int = 4
    """Image shards that may wait for embedders before generation pauses (`placement=pools`)."""
    max_worker_gb: float | None = None
    """Resident memory (10^9 bytes) after a shard above which a worker is replaced, against leaks in
    libraries; None sets no limit (`ray` only)."""
    threads: int = 1
    """Threads of numeric libraries in a worker. Another number may sum in another order, which can
    change the last bits; both engines give the same bytes at the same number."""
    attempts: int = 2
    """Times a shard may raise before it is quarantined."""
    max_quarantined: int = 20
    """The job fails when more shards and crashing records of a step than this have failed
    permanently."""
    shard_timeout_seconds: float = 7200.0
    """Time after which a worker that processes a shard or loads its models counts as hung and is
    replaced (`ray` only)."""
    drain_seconds: float = 60.0
    """How long shards in flight may take after SIGTERM or Ctrl-C before they are abandoned (`ray`
    only; `local` finishes its shard)."""
    progress_seconds: float = 10.0
    """Interval between lines of progress if the output is not a terminal."""
    price_per_hour: float | None = None
    """Price of a GPU-hour, or of a worker's hour if workers have no GPU; progress then includes the
    cost so far."""
    log: Literal["text", "json"] = "text"
    """`json` prints progress and events as one JSON object per line, for programs."""

    def __post_init__(self) -> None:
        self.pool  # noqa: B018 (checks its values)
        for name in ("threads", "attempts", "queue"):
            require_at_least(name, getattr(self, name), 1)
        if self.engine == "local" and self.workers != 1:
            raise ValueError(
                "workers must be 1 with engine=local, which is this process, found "
                f"{self.workers}; set engine to ray for more"
            )
        if self.engine == "local" and self.placement != "steps":
            raise ValueError(
                f"placement must be steps with engine=local, found {self.placement}; set engine "
                "to ray for steps that run at the same time"
            )
        for name in ("max_quarantined", "drain_seconds", "price_per_hour"):
            if (value := getattr(self, name)) is not None:
                require_at_least(name, value, 0)
        for name in ("shard_timeout_seconds", "progress_seconds", "max_worker_gb"):
            if (value := getattr(self, name)) is not None:
                require_above(name, value, 0)

    @property
    def has_gpus(self) -> bool:
        """Whether any worker has a GPU."""
        embedders = self.placement == "pools" and self.embedders.gpus_per_worker > 0
        return self.gpus_per_worker > 0 or embedders

    @property
    def pool(self) -> PoolConfig:
        """The workers of every step but those of `embedders`."""
        return PoolConfig(
            workers=self.workers,
            cpus_per_worker=self.cpus_per_worker,
            gpus_per_worker=self.gpus_per_worker,
        )
