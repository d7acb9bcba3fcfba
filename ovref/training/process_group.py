"""The workers of a training: processes of one `torch.distributed` group."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed as dist

from ovref.errors import ConfigError

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What launchers of `torch.distributed`, such as torchrun, tell their workers."""


@contextmanager
def joined(device: str | None) -> Iterator[str | None]:
    """Joins the other workers, if a launcher started some, over NCCL on GPUs and Gloo on CPUs.

    Args:
        device: as configured; None takes a GPU where there is one.

    Yields:
        This worker's device: of several GPUs of a machine the one of its $LOCAL_RANK.

    Raises:
        ConfigError: some of the launcher's variables are missing.
    """
    given = [name for name in LAUNCHED if name in os.environ]
    if "RANK" not in given:
        yield device
        return
    if missing := [name for name in LAUNCHED if name not in given]:
        raise ConfigError(
            f"RANK is set in the environment but {', '.join(missing)} not: start workers by "
            "torchrun, or unset RANK"
        )
    gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    if gpu:
        number = int(os.environ.get("LOCAL_RANK", 0))
        torch.cuda.set_device(number)
        device = f"cuda:{number}"
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def place() -> tuple[int, int]:
    """This worker's number, from 0, and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()
