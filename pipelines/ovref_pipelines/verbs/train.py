"""`ovref train`: trains a head, alone or as one of several workers.

    ovref train --config miniature_clip_rc
    torchrun --nproc-per-node 8 -m ovref_pipelines train --config clip_rc_voc data.root=/data/voc
    ovref train --config clip_rc_voc engine.engine=ray engine.workers=8 engine.gpus_per_worker=1

Workers that a launcher such as torchrun starts find each other by its environment variables.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from ovref.config import part
from ovref.locations import absolute, absolute_local, with_absolute_models
from ovref.training import train_clip_rc
from ovref.training.train_clip_rc import ClipRcTraining
from ovref_pipelines.console import Console
from ovref_pipelines.engine.config import EngineConfig
from ovref_pipelines.engine.run_steps import ray_left_as_found
from ovref_pipelines.verbs.evaluate import absolute_folder, this_process


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ClipRcTraining):
    """Settings of a training and of where it runs."""

    method: Literal["clip_rc"] = "clip_rc"
    """CLIP-RC (Zhang et al., CVPR 2024)."""
    engine: EngineConfig = field(default_factory=this_process)
    """This process, or (`engine.engine=ray`) `workers` workers of a Ray cluster, which must all see
    the data and the output. `workers`, `address`, `cpus_per_worker`, `gpus_per_worker`, `threads`
    and `attempts` count."""

    @property
    def spec(self) -> ClipRcTraining:
        """The part that says what is trained."""
        return part(self, ClipRcTraining)


def with_absolute_places(config: TrainConfig) -> TrainConfig:
    """The configuration with absolute places."""
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
    """Trains as `ovref.training.train_clip_rc.run`, with its errors; worker 0 reports progress.

    Raises:
        JobError: workers of Ray died too often; the same call resumes.
    """
    if config.engine.engine == "ray":
        from ovref_pipelines.ray import training_group

        with ray_left_as_found():
            training_group.run(config.spec, config.engine, console.say)
        return
    train_clip_rc.run_as_worker(config.spec, console.say)
