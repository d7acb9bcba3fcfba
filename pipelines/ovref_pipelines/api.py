"""The Python API of `ovref`: the verbs, with the same settings as in YAML and on the command line.

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
"""Settings by name, nested or with dots: {"engine": {"workers": 2}, "corpus.limit": 9}."""


def build(
    config: str | Path | Settings | BuildConfig, settings: Settings | None = None, say: Say = print
) -> BuildSummary:
    """Builds a collection or resumes building it: `ovref build` from Python.

    Args:
        config: the name of a configuration shipped with ovref, a YAML file, a mapping of all
            settings, or a `BuildConfig`.
        settings: changes to it, like `key=value` on the command line.
        say: called with lines for people.

    Raises:
        ConfigError: an unknown setting, or a value of another type or out of range.
        OvrefError: as in `ovref_pipelines.recipe.build`.
    """
    return run_build(configured(BuildConfig, config, settings), say)


def evaluate(
    config: Any, settings: Settings | None = None, say: Say = print, device: str | None = None
) -> dict[str, Any]:
    """Measures a collection: `ovref evaluate` from Python.

    Args:
        config, settings, say: as in `build`, for `ovref.evaluation.evaluate.EvaluateSpec`.
        device: "cpu", "cuda", ...; None selects a GPU if there is one.

    Returns, raises: as in `ovref.evaluation.evaluate.evaluate`.
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
    int8: bool = False,
) -> dict[str, int]:
    """Publishes a collection to a folder, an object store or the Hub: `ovref publish`.

    Args:
        title: title of its card; empty uses the last part of `target`.
        images: whether to publish the images of the references too.
        build: output of the build that made it; None uses the collection's parent folder.
        evaluation: path of an evaluation.json for the card; None uses the build's, if any.
        int8: whether to convert embeddings to int8, half the bytes.

    Returns, raises: as in `ovref.exchange.publishing.publish`.
    """
    from ovref_pipelines.verbs import publish as verb

    place = target.rstrip("/") if target.startswith("hf://") else absolute(target, "target")
    return verb.publish(
        absolute(collection, "collection"), place,
        title=title or place.rpartition("/")[2].partition("@")[0], images=images,
        build=absolute(build, "build") if build else None, evaluation=evaluation, replace=replace,
        int8=int8,
    )  # fmt: skip


def configured(kind: Any, config: Any, settings: Settings | None) -> Any:
    """The configuration of a verb with changes applied. Raises ConfigError like
    `ovref.config.load`."""
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
