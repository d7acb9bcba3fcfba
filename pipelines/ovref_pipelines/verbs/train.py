"""`ovref train`: trains a head, alone or as one of several workers.

    ovref train --config miniature_clip_rc
    torchrun --nproc-per-node 8 -m ovref_pipelines train --config clip_rc_voc data.root=/data/voc
    ovref train --config clip_rc_voc engine.engine=ray engine.workers=8 engine.gpus_per_worker=1
    ovref train --config fcclip_coco

Workers that a launcher such as torchrun starts find each other by its environment variables.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from ovref.config import load_tree, part, read_tree
from ovref.errors import ConfigError
from ovref.locations import absolute, absolute_local, with_absolute_models
from ovref.training.mask_settings import FcClipTraining, MaskFormerTraining
from ovref.training.methods import Training, module_of
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


@dataclass(frozen=True, kw_only=True)
class TrainFcClip(FcClipTraining):
    """Settings of a training of FC-CLIP's head and of where it runs."""

    method: Literal["fcclip"] = "fcclip"
    """FC-CLIP (Yu et al., NeurIPS 2023), for RetCLIP across data sets."""
    engine: EngineConfig = field(default_factory=this_process)
    """As of `method=clip_rc`."""

    @property
    def spec(self) -> FcClipTraining:
        """The part that says what is trained."""
        return part(self, FcClipTraining)


@dataclass(frozen=True, kw_only=True)
class TrainMaskFormer(MaskFormerTraining):
    """Settings of a training of an open MaskFormer and of where it runs."""

    method: Literal["mask_former"] = "mask_former"
    """A MaskFormer with open classes, for VOCSeg (its section 3.2)."""
    engine: EngineConfig = field(default_factory=this_process)
    """As of `method=clip_rc`."""

    @property
    def spec(self) -> MaskFormerTraining:
        """The part that says what is trained."""
        return part(self, MaskFormerTraining)


AnyTrainConfig = TrainConfig | TrainFcClip | TrainMaskFormer
Chosen = TypeVar("Chosen", bound=AnyTrainConfig)
METHODS: dict[str, type[AnyTrainConfig]] = {
    "clip_rc": TrainConfig, "fcclip": TrainFcClip, "mask_former": TrainMaskFormer,
}  # fmt: skip
"""Settings by `method`."""


def read(path: Path | None, overrides: list[str]) -> AnyTrainConfig:
    """The settings in a file, with overrides, as their `method` has them.

    Raises:
        ConfigError: as `config.load`; or there is no such method.
    """
    tree = read_tree(path)
    given = [one.partition("=")[2] for one in overrides if one.startswith("method=")]
    method = yaml.safe_load(given[-1]) if given else tree.get("method", "clip_rc")
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, found {method!r}")
    where = "command line" if path is None else str(path)
    return load_tree(METHODS[method], tree, where, overrides)


def with_absolute_places(config: Chosen) -> Chosen:
    """The configuration with absolute places."""
    changes: dict[str, Any] = {"output": absolute(config.output, "output")}
    if isinstance(config, TrainConfig) and config.start:
        changes["start"] = absolute(config.start, "start")
    data: dict[str, Any] = {}
    if config.data.root:
        data["root"] = absolute_local(config.data.root, "data.root")
    if config.data.folder is not None:
        data["folder"] = absolute_folder(config.data.folder)
    changes["data"] = dataclasses.replace(config.data, **data)
    return dataclasses.replace(with_absolute_models(config), **changes)


def train(config: AnyTrainConfig, console: Console) -> None:
    """Trains as `run` of the method's module in `ovref.training`, with its errors; worker 0 reports
    progress.

    Raises:
        JobError: workers of Ray died too often; the same call resumes.
    """
    if config.engine.engine == "ray":
        from ovref_pipelines.ray import training_group

        with ray_left_as_found():
            training_group.run(config.spec, config.engine, console.say)
        return
    spec: Training = config.spec
    module_of(spec).run_as_worker(spec, console.say)
