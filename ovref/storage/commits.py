"""The marker of a shard: its existence is the commit, its content names the shard's files."""

import json
import re
from dataclasses import dataclass
from typing import Any

from ovref.errors import StorageError

COMMITS = "_commits"
"""Folder of a step's markers."""
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One file that a marker names."""

    name: str
    sha256: str
    size: int
    """Bytes."""


@dataclass(frozen=True, kw_only=True)
class Commit:
    """The content of a marker."""

    shard: str
    fingerprint: str
    """Fingerprint of the step."""
    files: dict[str, StoredFile]
    """By extension: `parquet` always, `tar` and `drops.jsonl` where there is something in them."""
    inputs: int
    """Records read."""
    outputs: int
    """Records written."""
    dropped: dict[str, int]
    """Whole inputs dropped, by reason."""
    dropped_parts: dict[str, int]
    """Parts of inputs (regions) dropped, by reason."""
    seconds: float
    """Wall clock, from the first record to the upload."""
    attempt: int
    """0 for the first."""


def marker_path(shard: str) -> str:
    """Path of a shard's marker in its step. Raises StorageError for an unsafe name."""
    if not SHARD_NAME.fullmatch(shard):
        raise StorageError(f"a shard's name must be letters, digits, '-' and '_', found {shard!r}")
    return f"{COMMITS}/{shard}.json"


def parse_marker(data: bytes, where: str) -> Commit:
    """The content of a marker. Raises StorageError, which names `where`, if it is not one."""
    tree = json_object(data, where)
    try:
        files = {extension: StoredFile(**file) for extension, file in tree.pop("files").items()}
        return Commit(files=files, **tree)
    except (KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{where} is not a commit marker of ovref: {error!r}") from error


def json_object(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object read from `where`. Raises StorageError if it is damaged."""
    try:
        tree = json.loads(data)
    except ValueError as error:
        raise StorageError(f"{where} is damaged: {error}") from error
    if not isinstance(tree, dict):
        raise StorageError(f"{where} must hold a JSON object, found {type(tree).__name__}")
    return tree


def json_bytes(value: Any) -> bytes:
    """The canonical JSON text of `value`, for step.json, complete.json and the markers."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1).encode()
