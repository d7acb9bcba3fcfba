"""Evaluation on the engine of builds: resumable, on several workers if configured."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ovref.config import part
from ovref.evaluation import evaluate as evaluation
from ovref.evaluation.counting import ScoreImages
from ovref.evaluation.named_sets.label_folder import LabelFolder
from ovref.evaluation.spec import EvaluateSpec
from ovref.locations import absolute, absolute_local, with_absolute_models
from ovref.storage.steps import StepFolder
from ovref_inference.models import MINIATURE
from ovref_pipelines.console import Console
from ovref_pipelines.engine.config import EngineConfig
from ovref_pipelines.engine.run_steps import (
    progress_of,
    ray_left_as_found,
    run_step,
)
from ovref_pipelines.engine.summary import step_line
from ovref_pipelines.errors import JobError

Spec = TypeVar("Spec", bound=EvaluateSpec)


def this_process() -> EngineConfig:
    """Runs everything in this process, without Ray."""
    return EngineConfig(engine="local")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EvaluateSpec):
    """Settings of an evaluation and of where it runs."""

    engine: EngineConfig = field(default_factory=this_process)
    """Where images are segmented: in this process, with the libraries' own number of threads, or
    (`engine.engine=ray`) on the workers of a Ray cluster, which must all have access to the data
    set, the collection and the output."""

    @property
    def spec(self) -> EvaluateSpec:
        """The settings that determine what is counted."""
        return part(self, EvaluateSpec)


def with_absolute_places(config: Spec) -> Spec:
    """The configuration with absolute places."""
    changes: dict[str, Any] = {"output": absolute_local(config.output, "output")}
    for name in ("collection", "fallback"):
        if value := getattr(config, name):
            changes[name] = absolute(value, name)
    for name in ("root", "features"):
        if value := getattr(config, name):
            changes[name] = absolute_local(value, name)
    if "/" in config.names or config.names.endswith(".txt"):
        changes["names"] = absolute_local(config.names, "names")
    if config.folder is not None:
        changes["folder"] = absolute_folder(config.folder)
    if config.clip_rc.weights and not config.clip_rc.weights.startswith(MINIATURE):
        weights = absolute(config.clip_rc.weights, "clip_rc.weights")
        changes["clip_rc"] = dataclasses.replace(config.clip_rc, weights=weights)
    if config.knn.folder is not None:
        folder = absolute_folder(config.knn.folder)
        changes["knn"] = dataclasses.replace(config.knn, folder=folder)
    return dataclasses.replace(with_absolute_models(config), **changes)


def absolute_folder(folder: LabelFolder) -> LabelFolder:
    """The same with its places as they are seen from any folder."""
    places = [one for one in ("images", "labels", "classes") if getattr(folder, one)]
    changes: dict[str, Any] = {
        one: absolute_local(getattr(folder, one), one) for one in places
    }
    return dataclasses.replace(folder, **changes)


def evaluate(config: EvaluateConfig, console: Console) -> dict[str, Any]:
    """Evaluates as `ovref.evaluation.evaluate.evaluate`: in this process, or on Ray's workers.

    Raises:
        JobError: shards failed permanently on the workers.
        StoppedError: SIGTERM or SIGINT was received; the same call resumes the evaluation.
        OvrefError: as `ovref.evaluation.evaluate.evaluate`.
    """
    if config.engine.engine == "local":
        return evaluation.evaluate(config.spec, console.show)

    def run(spec: ScoreImages, images: StepFolder, scores: StepFolder) -> None:
        progress = progress_of(scores, config.engine)
        step = run_step([spec], images, scores, config.engine, progress)
        if step.quarantined:
            raise JobError(
                f"{len(step.quarantined)} shards of images failed permanently, among them "
                f"{step.quarantined[0]}; see _quarantine in {scores.store.url}. The same command "
                "retries them"
            )
        console.say(step_line(step))

    with ray_left_as_found():
        return evaluation.evaluate(config.spec, console.show, run_shards=run)
