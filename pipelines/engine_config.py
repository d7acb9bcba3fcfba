"""Where shards run, as data."""

from dataclasses import dataclass
from typing import Literal

from ovref.config import STRICT


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Where shards run. Nothing here but `threads` can change a byte of the output."""

    __pydantic_config__ = STRICT

    engine: Literal["local", "ray"] = "ray"
    """`ray` runs shards on the actors of a Ray cluster, `local` in this process."""
    workers: int = 1
    """Ray actors, each with all models of a step and one shard in flight; 1 with `local`."""
    address: str | None = None
    """Of a running Ray cluster, `auto` for this machine's; None takes $RAY_ADDRESS or else starts
    a Ray for this job alone."""
    cpus_per_worker: float = 1.0
    """CPU cores that Ray sets aside for a worker."""
    gpus_per_worker: float = 0.0
    """GPUs that Ray sets aside for a worker; a fraction shares one."""
    threads: int = 1
    """Threads of numeric libraries in a worker. Another number may add in another order, which can
    change last bits; both engines give the same bytes at the same number."""
    attempts: int = 2
    """Times a shard may raise before it is quarantined."""
    max_quarantined: int = 20
    """The job gives up when more shards of a step than this were quarantined."""
    shard_timeout_seconds: float = 7200.0
    """After which the worker of a shard counts as hung and is replaced (`ray` only)."""
    drain_seconds: float = 60.0
    """How long shards in flight may take after SIGTERM or Ctrl-C before they are abandoned (`ray`
    only; `local` finishes its shard)."""
    progress_seconds: float = 10.0
    """Between two lines of progress where the output is not a terminal."""

    def __post_init__(self) -> None:
        for name in ("workers", "threads", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.engine == "local" and self.workers != 1:
            raise ValueError(
                "workers must be 1 with engine=local, which is this process, found "
                f"{self.workers}; set engine to ray for more"
            )
        for name in ("max_quarantined", "cpus_per_worker", "gpus_per_worker", "drain_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, found {getattr(self, name)}")
        for name in ("shard_timeout_seconds", "progress_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be more than 0, found {getattr(self, name)}")
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(
                f"gpus_per_worker above 1 must be a whole number, found {self.gpus_per_worker}"
            )
