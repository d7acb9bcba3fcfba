"""Model ids: `miniature:<name>` is in the package ovref_miniature, all others pass unchanged."""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ovref_inference.errors import ModelError

MINIATURE = "miniature:"
LONGEST_REASON = 400
"""Maximum length of a quoted library message; some list every name that the library knows."""


@contextmanager
def model_errors(attempt: str, advice: str = "") -> Iterator[None]:
    """Turns what model libraries raise for missing, broken or unfit files into a ModelError.

    Args:
        attempt: what the block does, as in "load the visual encoder x".
        advice: the end of the message: what to do.

    Raises:
        ModelError: the block raised a library error, which becomes its cause.
        torch.OutOfMemoryError: as raised; no other model would help.
    """
    import torch
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (
        OSError, EOFError, ValueError, LookupError, RuntimeError, ImportError, TypeError,
        AttributeError, AssertionError, SafetensorError,
        torch.serialization.pickle.UnpicklingError,  # of a file that is more than tensors
    ) as error:  # fmt: skip
        reason = str(error) or type(error).__name__
        if isinstance(error, LookupError):
            reason = f"{type(error).__name__} {reason}"
        if len(reason) > LONGEST_REASON:
            reason = f"{reason[:LONGEST_REASON]} ..."
        raise ModelError(f"cannot {attempt}: {reason}{advice}") from error


def resolve(model_id: str) -> str:
    """The folder of `miniature:<name>`; any other id (a hub id, a local path) as it is.

    Raises:
        ModelError: the miniature's models are not installed, or none has that name.
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


def canonical(model_id: str) -> str:
    """The absolute path of a model's folder, by which it is known from anywhere; any other id as it
    is."""
    path = Path(model_id).expanduser()
    return str(path.absolute()) if path.is_dir() else model_id


def miniature_folder(wanted: str) -> Path:
    """The folder of the package `ovref_miniature`, found without importing it.

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
    """First argument and options for transformers' `from_pretrained`; a local folder needs no
    network, and code that a repository brings is never run.

    Args:
        model_id: as in `resolve`, which raises for it.
        revision: of a hub repository; empty for the newest.
    """
    path = resolve(model_id)
    return path, {
        "revision": revision or None,
        "local_files_only": Path(path).is_dir(),
        "trust_remote_code": False,
    }


def check_complete(model_id: str, report: Mapping[str, Any]) -> None:
    """Refuses a model whose missing weights were initialised at random.

    Args:
        report: the loading info from `from_pretrained(..., output_loading_info=True)`.

    Raises:
        ModelError: weights are missing.
    """
    if report["missing_keys"]:
        raise ModelError(
            f"{model_id} lacks weights for {sorted(report['missing_keys'])[:5]}: it was saved "
            "from another architecture"
        )


def copy_weights(own: Mapping[str, Any], found: Mapping[str, Any], place: str) -> None:
    """Copies tensors into parameters of the same names and shapes.

    Args:
        own: the parameters.
        found: the tensors.
        place: where they are from, for messages.

    Raises:
        ModelError: names or shapes differ; the message has the first that does.
    """
    import torch

    wrong = sorted(
        name
        for name in own.keys() | found.keys()
        if name not in own or name not in found or own[name].shape != found[name].shape
    )
    if wrong:
        shapes = [tuple(of[wrong[0]].shape) if wrong[0] in of else "nothing" for of in (found, own)]
        raise ModelError(
            f"the weights in {place} are of another architecture or width: {len(wrong)} parameters "
            f"differ, the first is {wrong[0]} with {shapes[0]}, expected {shapes[1]}"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(found[name])
