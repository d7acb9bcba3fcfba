"""Checkpoints of a training: tensors as safetensors and one JSON file, which is the commit.

    checkpoints/00001000.weights.safetensors    what is trained
    checkpoints/00001000.optimiser.safetensors  the optimiser's moments
    checkpoints/00001000.json                   step, history, checksums; written last

A checkpoint without its JSON file is that of a killed write and is passed over.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ovref.errors import MismatchError, StorageError
from ovref.identity import canonical, changes
from ovref.storage.file_store import Store

FOLDER = "checkpoints"
TENSORS = ("weights", "optimiser")
_NAME = re.compile(rf"{FOLDER}/(\d+)\.json")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where a training was after a step."""

    step: int
    """Steps done."""
    weights: Mapping[str, torch.Tensor]
    optimiser: Mapping[str, torch.Tensor]
    history: Sequence[Mapping[str, float]]
    """Mean losses over each interval between two log entries."""
    seconds: float
    """Training time over all starts."""


def steps_saved(store: Store) -> list[int]:
    """Steps of the checkpoints, in order."""
    found = (_NAME.fullmatch(path) for path in store.list(FOLDER))
    return sorted(int(match[1]) for match in found if match)


def write(store: Store, checkpoint: Checkpoint, identity: Mapping[str, Any]) -> None:
    """Writes a checkpoint; it is there once all of it is."""
    name = f"{FOLDER}/{checkpoint.step:08d}"
    checksums = {}
    for part in TENSORS:
        tensors: Mapping[str, torch.Tensor] = getattr(checkpoint, part)
        data = _encoded(tensors)
        checksums[part] = hashlib.sha256(data).hexdigest()
        store.write(f"{name}.{part}.safetensors", data)
    described = {
        "step": checkpoint.step,
        "seconds": round(checkpoint.seconds, 1),
        "identity": canonical(identity),
        "sha256": checksums,
        "history": [dict(row) for row in checkpoint.history],
    }
    store.write(f"{name}.json", json.dumps(described, indent=1).encode())


def read(store: Store, step: int, identity: Mapping[str, Any] | None = None) -> Checkpoint:
    """The checkpoint of a step.

    Args:
        identity: what it must have been trained with; None takes any.

    Raises:
        MismatchError: it is of another training; the message says what differs.
        StorageError: it is missing or damaged.
    """
    name = f"{FOLDER}/{step:08d}"
    try:
        described = json.loads(store.read(f"{name}.json"))
        if identity is not None:
            check_identity(store, described["identity"], identity)
        parts = {}
        for part in TENSORS:
            data = store.read(f"{name}.{part}.safetensors")
            if hashlib.sha256(data).hexdigest() != described["sha256"][part]:
                raise ValueError(f"{part} have another checksum")
            parts[part] = load(data)
        return Checkpoint(
            step=described["step"], history=described["history"], seconds=described["seconds"],
            **parts,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise StorageError(
            f"the checkpoint {store.url}/{name} is damaged ({error}): delete its JSON file to "
            "resume from the one before"
        ) from error


def identity_of(store: Store, step: int) -> dict[str, Any]:
    """What the checkpoint of a step was trained with. Raises StorageError as `read`."""
    try:
        return json.loads(store.read(f"{FOLDER}/{step:08d}.json"))["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{store.url}/{FOLDER}/{step:08d}.json is damaged: {error}") from error


def check_identity(store: Store, found: Any, wanted: Mapping[str, Any]) -> None:
    """Raises MismatchError unless a checkpoint was trained with the wanted settings."""
    if different := changes(found, canonical(wanted)):
        raise MismatchError(
            f"{store.url} holds a training with other settings: {'; '.join(different)}. Choose "
            "another output, or the settings of that one"
        )


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of tensors as they are written."""
    return hashlib.sha256(_encoded(tensors)).hexdigest()


def _encoded(tensors: Mapping[str, torch.Tensor]) -> bytes:
    return save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})


def delete_but(store: Store, kept: Sequence[int]) -> None:
    """Deletes the checkpoints of all other steps, their JSON files first."""
    gone = [step for step in steps_saved(store) if step not in kept]
    for step in gone:
        for end in ("json", *(f"{part}.safetensors" for part in TENSORS)):
            store.delete(f"{FOLDER}/{step:08d}.{end}")
