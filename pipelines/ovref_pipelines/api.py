"""What `ovref` offers to Python: the verbs with the same settings as in YAML and in the shell.

import ovref
summary = ovref.build("miniature", {"output": "runs/x", "corpus.limit": 40})
result = ovref.evaluate({"collection": summary.collection_url, "output": "runs/x/evaluation"})
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ovref.config import load
from ovref.errors import ConfigError
from ovref.locations import absolute
from ovref_pipelines import shipped
from ovref_pipelines.build_config import BuildConfig
from ovref_pipelines.recipe import BuildSummary
from ovref_pipelines.recipe import build as run_build

Say = Callable[[str], None]
Settings = Mapping[str, Any]
"""Settings by their names, nested or with dots: {"engine": {"workers": 2}, "corpus.limit": 9}."""


def build(
    config: str | Path | Settings | BuildConfig, settings: Settings | None = None, say: Say = print
) -> BuildSummary:
    """Builds a collection, or carries on building it: `ovref build` from Python.

    Args:
        config: the name of a configuration that comes with ovref, a YAML file, all settings as a
            mapping, or a `BuildConfig`.
        settings: changes to it, as `key=value` in the shell.
        say: gets lines for people.

    Raises:
        ConfigError: an unknown setting, or a value of another type or out of range.
        OvrefError: as of `ovref_pipelines.recipe.build`.
    """
    return run_build(configured(BuildConfig, config, settings), say)


def evaluate(
    config: Any, settings: Settings | None = None, say: Say = print, device: str | None = None
) -> dict[str, Any]:
    """Measures a collection: `ovref evaluate` from Python.

    Args:
        config, settings, say: as of `build`, for `ovref.evaluation.evaluate.EvaluateSpec`.
        device: "cpu", "cuda", ...; None takes a GPU where there is one.

    Returns, raises: as of `ovref.evaluation.evaluate.evaluate`.
    """
    from ovref.evaluation.evaluate import EvaluateSpec
    from ovref.evaluation.evaluate import evaluate as run
    from ovref_pipelines.verbs.evaluate import with_absolute_places

    return run(with_absolute_places(configured(EvaluateSpec, config, settings)), say, device)


def publish(
    collection: str,
    target: str,
    *,
    title: str = "",
    images: bool = True,
    build: str | None = None,
    evaluation: str | None = None,
    replace: bool = False,
) -> dict[str, int]:
    """Publishes a collection at a folder, an object store or the Hub: `ovref publish`.

    Args:
        title: of its card; empty takes the last part of `target`.
        images: whether the images of the references go with it.
        build: output of the build that made it; None takes the folder that the collection is in.
        evaluation: path of an evaluation.json for the card; None takes the build's, if any.

    Returns, raises: as of `ovref.exchange.publishing.publish`.
    """
    from ovref_pipelines.verbs import publish as verb

    place = target.rstrip("/") if target.startswith("hf://") else absolute(target, "target")
    return verb.publish(
        absolute(collection, "collection"), place,
        title=title or place.rpartition("/")[2].partition("@")[0], images=images,
        build=absolute(build, "build") if build else None, evaluation=evaluation, replace=replace,
    )  # fmt: skip


def configured(kind: Any, config: Any, settings: Settings | None) -> Any:
    """The configuration of a verb with its changes. Raises ConfigError like `ovref.config.load`."""
    if isinstance(config, kind):
        if settings:
            raise ConfigError(f"change a {kind.__name__} itself, by dataclasses.replace")
        return config
    if isinstance(config, Mapping):
        return load(kind, None, [*_overrides(config), *_overrides(settings or {})])
    return load(kind, shipped.find(str(config)), list(_overrides(settings or {})))


def _overrides(settings: Settings, above: str = "") -> Iterator[str]:
    for name, value in settings.items():
        key = f"{above}{name}"
        if isinstance(value, Mapping):
            yield from _overrides(value, f"{key}.")
        else:
            yield f"{key}={value if isinstance(value, str) else json.dumps(_plain(value))}"


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
