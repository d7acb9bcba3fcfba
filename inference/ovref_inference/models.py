"""Model ids: `miniature:<name>` is in the package ovref_miniature, others pass unchanged."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ovref_inference.errors import ModelError

MINIATURE = "miniature:"
PRETRAINED_ERRORS = (
    OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, AttributeError,
)  # fmt: skip
"""What transformers raises when a model's files are missing, broken or of another architecture."""


def resolve(model_id: str) -> str:
    """The folder of `miniature:<name>`; any other id (a hub id, a local path) as it is.

    Raises:
        ModelError: the miniature's models are not installed, or there is none of that name.
    """
    if not model_id.startswith(MINIATURE):
        return model_id
    name = model_id.removeprefix(MINIATURE)
    weights = miniature_folder(model_id) / "weights"
    known = sorted(path.name for path in weights.iterdir()) if weights.is_dir() else []
    # A name that is not one of the folders (`../x`, an empty one) never becomes a path.
    if name not in known:
        raise ModelError(
            f"no miniature model {name!r} under {weights}; found: {', '.join(known) or 'none'}"
        )
    return str(weights / name)


def miniature_folder(wanted: str) -> Path:
    """Where the package `ovref_miniature` lies; it is found but not imported.

    Args:
        wanted: the model's id, for the message.

    Raises:
        ModelError: it is not installed.
    """
    spec = importlib.util.find_spec("ovref_miniature")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"{wanted} is one of the miniature's models, which are not installed here: in a clone "
            "of ovref's repository, run `pip install ./pipelines/ovref_miniature`; or give "
            "the path of a model folder"
        )
    return Path(spec.submodule_search_locations[0])


def pretrained(model_id: str, revision: str) -> tuple[str, dict[str, Any]]:
    """First argument and options of a `from_pretrained` of transformers; a folder stays offline.

    Args:
        model_id: as of `resolve`, with its errors.
        revision: of a hub repository; empty for the newest.
    """
    path = resolve(model_id)
    return path, {"revision": revision or None, "local_files_only": Path(path).is_dir()}


def check_complete(model_id: str, report: Mapping[str, Any]) -> None:
    """Refuses a model for which weights were made up.

    Args:
        report: what `from_pretrained(..., output_loading_info=True)` tells.

    Raises:
        ModelError: weights are missing.
    """
    if report["missing_keys"]:
        raise ModelError(
            f"{model_id} lacks weights for {sorted(report['missing_keys'])[:5]}: it was saved "
            "from another architecture"
        )
