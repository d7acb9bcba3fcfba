"""Single records out of a step's shards, for whoever looks at some of them.

`StepFolder.read` gives all records of a shard, its checksum compared before. Here the members of a
tar are found once, and of a record only its own bytes are read: sizes are compared, checksums are
not. A shard in an object store is copied to a temporary folder, the newest few of them.
"""

import tarfile
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ovref.errors import StorageError
from ovref.storage import codec
from ovref.storage.codec import Record
from ovref.storage.scratch import scratch_folder
from ovref.storage.steps import StepFolder

SHARDS = 32
"""Shards whose members are remembered; of an object store, whose copies are kept."""


@dataclass
class _Open:
    path: Path
    members: dict[str, list[tuple[str, int, int]]]
    """Key -> extension, offset and size of each of its members."""
    copy: TemporaryDirectory | None


class Samples:
    """Records of a step by shard and key. Safe for use by several threads."""

    def __init__(self, step: StepFolder) -> None:
        self._step = step
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._lock = threading.Lock()

    def keys(self, shard: str) -> list[str]:
        """The keys of a shard's records, in order. Raises StorageError like `get`."""
        return list(self._shard(shard).members)

    def get(self, shard: str, key: str) -> Record:
        """One record.

        Raises:
            StorageError: the shard is not committed, has no such record, or is damaged.
        """
        with self._lock:
            found = self._shard_locked(shard)
            if key not in found.members:
                raise StorageError(f"shard {shard} of {self._step.store.url} has no record {key}")
            with open(found.path, "rb") as file:
                sample = {}
                for extension, offset, size in found.members[key]:
                    file.seek(offset)
                    sample[extension] = file.read(size)
        try:
            return codec.decode(key, sample)
        except ValueError as error:
            raise StorageError(f"shard {shard} of {self._step.store.url}: {error}") from error

    def close(self) -> None:
        """Removes the copies."""
        with self._lock:
            for found in self._open.values():
                _drop(found)
            self._open.clear()

    def _shard(self, shard: str) -> _Open:
        with self._lock:
            return self._shard_locked(shard)

    def _shard_locked(self, shard: str) -> _Open:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        commit = self._step.required(shard)
        if "tar" not in commit.files:
            raise StorageError(f"shard {shard} of {self._step.store.url} has no records")
        name, size = commit.files["tar"].name, commit.files["tar"].size
        copy = None
        if self._step.store.is_local:
            with self._step.store.local_copy(name) as path:
                where = path
        else:
            copy = scratch_folder()
            where = Path(copy.name) / "shard.tar"
            with self._step.store.local_copy(name) as path:
                path.replace(where)
        if where.stat().st_size != size:
            raise StorageError(
                f"{self._step.store.url}/{name} is cut off: expected {size} bytes, found "
                f"{where.stat().st_size}"
            )
        self._open[shard] = _Open(where, _members(where, name), copy)
        if len(self._open) > SHARDS:
            _drop(self._open.popitem(last=False)[1])
        return self._open[shard]


def _members(path: Path, name: str) -> dict[str, list[tuple[str, int, int]]]:
    members: dict[str, list[tuple[str, int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                members.setdefault(key, []).append((extension, member.offset_data, member.size))
    except tarfile.TarError as error:
        raise StorageError(f"{name} is not a shard of ovref: {error}") from error
    return members


def _drop(found: _Open) -> None:
    if found.copy is not None:
        found.copy.cleanup()
