"""Loads every model of a build and runs it on one blank input before any work begins.

A model that loads may still fail on its first input (a vision tower with another input size, a
backbone that is not a plain ViT). Found here, this costs a minute; found by the last step of a
build, it costs all steps before.
"""

import dataclasses
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ovref.contract import Dropped
from ovref.errors import ModelError, OvrefError
from ovref_inference.models import miniature_folder, resolve

WHOLE_BYTES = 1 << 24
"""Files up to this size are hashed completely."""
BLOCK_BYTES = 1 << 16
BLOCKS = 64
"""Number of evenly spaced blocks hashed of a larger file, including the first and the last."""
UNKNOWN = "unknown"
"""Fingerprint of weights that are not on this machine."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckedModel:
    """A model of a build and the fingerprint of its weights."""

    step: str
    """Name of the stage: `synthesize`, `embed`, ..."""
    setting: str
    """Setting of the stage that names the model: `visual.model`."""
    model: str
    revision: str
    """As configured; empty if not set."""
    weights: str
    """`weights_fingerprint`."""


def check_models(specs: Iterable[Any]) -> tuple[CheckedModel, ...]:
    """Builds each stage, runs it on one blank input, and fingerprints its weights.

    The stages are built one after another and not kept. Runs on the device that workers use;
    arguments and result can be pickled.

    Args:
        specs: the specs of a build; those without a method `check` are only fingerprinted.

    Raises:
        ModelError: a model cannot be loaded, or fails on the blank input.
    """
    found = []
    for spec in specs:
        check_stage(spec)
        found += [
            CheckedModel(
                step=spec.name,
                setting=setting,
                model=model,
                revision=revision,
                weights=weights_fingerprint(model, revision),
            )
            for setting, model, revision in models_of(spec)
        ]
    return tuple(found)


def changed_models(before: Iterable[CheckedModel], now: Iterable[CheckedModel]) -> list[str]:
    """A message for each model whose weights differ under the same name and revision."""
    known = {(old.step, old.setting, old.model, old.revision): old.weights for old in before}
    lines = []
    for model in now:
        old = known.get((model.step, model.setting, model.model, model.revision))
        if old is not None and UNKNOWN not in (old, model.weights) and old != model.weights:
            lines.append(
                f"{model.step}.{model.setting}={model.model} has different weights than before: "
                f"{old[:19]}... then, {model.weights[:19]}... now"
            )
    return lines


def models_of(spec: Any) -> Iterator[tuple[str, str, str]]:
    """The models in a spec: path of the setting, model id, revision or an empty string."""
    if hasattr(spec, "tagger") and spec.source != "labels":
        yield "tagger", spec.tagger, spec.tagger_version or ""
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if field.name == "model" and isinstance(value, str):
            yield "model", value, getattr(spec, "revision", "") or ""
        elif dataclasses.is_dataclass(value):
            for path, model, revision in models_of(value):
                yield f"{field.name}.{path}", model, revision
        elif isinstance(value, tuple) and value and all(map(dataclasses.is_dataclass, value)):
            for number, item in enumerate(value):
                for path, model, revision in models_of(item):
                    yield f"{field.name}.{number}.{path}", model, revision


def weights_fingerprint(model: str, revision: str = "") -> str:
    """Distinguishes weights with the same name.

    Args:
        model: `miniature:<name>`, a folder or file, a Hugging Face id (with or without `hf-hub:`),
            open_clip's `<architecture>:<tag>`, or an installed spaCy package.
        revision: revision of the Hugging Face repository; empty for its default branch.

    Returns:
        `sha256:<64 digits>` of the files' names, sizes and contents (64 blocks of a large file),
        `commit:<40 digits>` of the snapshot in the Hugging Face cache, or `unknown`.

    Raises:
        ModelError: there is no such miniature model.
    """
    if model == "miniature:tagger":
        return _files_fingerprint(miniature_folder(model) / "tagger")
    path = Path(resolve(model)).expanduser()
    if path.exists():
        return _files_fingerprint(path)
    repository = model.removeprefix("hf-hub:")
    if ":" in repository:
        repository = _open_clip_repository(repository)
    if "/" in repository:
        return _cached_commit(repository, revision)
    package = importlib.util.find_spec(model) if model.isidentifier() else None
    if package is not None and package.submodule_search_locations:
        return _files_fingerprint(Path(package.submodule_search_locations[0]))
    return UNKNOWN


def check_stage(spec: Any) -> None:
    """Builds a stage that loads models and runs it on one blank input.

    Args:
        spec: of any stage. Specs of stages that load models have a method `check`, which returns
            the stage's output; nothing is done for others.

    Raises:
        ModelError: a model cannot be loaded, or fails on the blank input.
    """
    if not hasattr(spec, "check"):
        return
    try:
        answers = spec.check()
    except OvrefError:
        raise
    except Exception as error:  # whatever a model's own code raises
        raise ModelError(
            f"stage {spec.name} fails on a blank input with its models ({_names(spec)}): "
            f"{type(error).__name__}: {error}"
        ) from error
    for answer in answers:
        if isinstance(answer, Dropped) and answer.reason.startswith("nonfinite"):
            raise ModelError(
                f"stage {spec.name} gets non-finite numbers from its models "
                f"({_names(spec)}) for a blank input: choose another dtype or precision, or "
                "another model"
            )


def _names(spec: Any) -> str:
    return ", ".join(dict.fromkeys(model for _, model, _ in models_of(spec)))


def _files_fingerprint(path: Path) -> str:
    """SHA-256 over the visible files of a folder, or over one file."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else ""
        if any(part.startswith(".") or part == "__pycache__" for part in name.split("/")):
            continue
        size = file.stat().st_size
        total.update(f"{name}\0{size}\0".encode())
        with open(file, "rb") as content:
            if size <= WHOLE_BYTES:
                total.update(content.read())
                continue
            for number in range(BLOCKS):
                content.seek((size - BLOCK_BYTES) * number // (BLOCKS - 1))
                total.update(content.read(BLOCK_BYTES))
    return f"sha256:{total.hexdigest()}"


def _cached_commit(repository: str, revision: str) -> str:
    """The commit of a Hugging Face repository in the local cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
    wanted = revision or constants.DEFAULT_REVISION
    if (folder / "snapshots" / wanted).is_dir():  # the revision is a commit
        return f"commit:{wanted}"
    reference = folder / "refs" / wanted
    return f"commit:{reference.read_text().strip()}" if reference.is_file() else UNKNOWN


def _open_clip_repository(name: str) -> str:
    """The Hugging Face id of `<architecture>:<tag>`; empty if open_clip has none."""
    import open_clip

    architecture, _, tag = name.partition(":")
    known = open_clip.get_pretrained_cfg(architecture, tag)
    return "/".join(known.get("hf_hub", "").split("/")[:2])  # then perhaps a file
