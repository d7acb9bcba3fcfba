"""`ovref train`: trains a head, alone or as one of several workers.

    ovref train --config miniature_clip_rc
    torchrun --nproc-per-node 8 -m ovref_pipelines train --config clip_rc_voc data.root=/data/voc

Workers that a launcher such as torchrun starts find each other by its environment variables.
"""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import distributed as dist

from ovref.errors import ConfigError
from ovref.places import absolute, absolute_local, with_absolute_models
from ovref.training import clip_rc
from ovref.training.clip_rc import ClipRcTraining
from ovref_pipelines.console import Console
from ovref_pipelines.verbs.evaluate import absolute_folder

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What launchers of torch.distributed tell their workers."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ClipRcTraining):
    """What is trained."""

    method: Literal["clip_rc"] = "clip_rc"
    """CLIP-RC (Zhang et al., CVPR 2024)."""


def with_absolute_places(config: TrainConfig) -> TrainConfig:
    """The configuration with every place as it is seen from any folder."""
    changes: dict[str, Any] = {"output": absolute(config.output, "output")}
    if config.start:
        changes["start"] = absolute(config.start, "start")
    data: dict[str, Any] = {}
    if config.data.root:
        data["root"] = absolute_local(config.data.root, "data.root")
    if config.data.folder is not None:
        data["folder"] = absolute_folder(config.data.folder)
    changes["data"] = dataclasses.replace(config.data, **data)
    return dataclasses.replace(with_absolute_models(config), **changes)


def train(config: TrainConfig, console: Console) -> None:
    """Trains as `ovref.training.clip_rc.run`, with its errors; worker 0 tells how it goes."""
    with workers(config.device) as device:
        here = dataclasses.replace(config, device=device)
        first = not dist.is_initialized() or dist.get_rank() == 0
        clip_rc.run(here, console.say if first else lambda line: None)


@contextmanager
def workers(device: str | None) -> Iterator[str | None]:
    """Joins the other workers, if a launcher started some; gives this one's device.

    Raises:
        ConfigError: a part of what launchers tell is missing.
    """
    told = [name for name in LAUNCHED if name in os.environ]
    if "RANK" not in told:
        yield device
        return
    if missing := [name for name in LAUNCHED if name not in told]:
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
