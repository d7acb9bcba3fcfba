"""Single records out of a step's shards, for whoever looks at some of them.

`StepFolder.read` gives all records of a shard, its checksum compared before. Here the members of a
tar are found once, and of a record only its own bytes are read: sizes are compared, checksums are
not. A shard in an object store is copied to a temporary folder, the newest few of them.
"""

import os
import tarfile
from functools import lru_cache

from ovref.errors import StorageError
from ovref.storage import codec
from ovref.storage.codec import Record
from ovref.storage.copies import Copies
from ovref.storage.steps import StepFolder

SHARDS = 32
"""Shards whose members are remembered; of an object store, whose copies are kept."""


Members = dict[str, list[tuple[str, int, int]]]
"""Key -> extension, offset and size of each of its members."""


class Samples:
    """Records of a step by shard and key. Safe for use by several threads."""

    def __init__(self, step: StepFolder) -> None:
        self._step = step
        self._copies = Copies(step.store, SHARDS)
        self._members = lru_cache(SHARDS)(self._read)

    def keys(self, shard: str) -> list[str]:
        """The keys of a shard's records, in order. Raises StorageError like `get`."""
        return list(self._members(shard)[1])

    def get(self, shard: str, key: str) -> Record:
        """One record.

        Raises:
            StorageError: the shard is not committed, has no such record, or is damaged.
        """
        name, members = self._members(shard)
        if key not in members:
            raise StorageError(f"shard {shard} of {self._step.store.url} has no record {key}")
        sample = {}
        with self._copies.open(name) as file:
            for extension, offset, size in members[key]:
                file.seek(offset)
                sample[extension] = file.read(size)
        try:
            return codec.decode(key, sample)
        except ValueError as error:
            raise StorageError(f"shard {shard} of {self._step.store.url}: {error}") from error

    def close(self) -> None:
        """Removes the copies."""
        self._copies.close()

    def _read(self, shard: str) -> tuple[str, Members]:
        """The file of a shard, and its members."""
        commit = self._step.required(shard)
        if "tar" not in commit.files:
            raise StorageError(f"shard {shard} of {self._step.store.url} has no records")
        name, size = commit.files["tar"].name, commit.files["tar"].size
        members: Members = {}
        with self._copies.open(name) as file:
            if (found := os.fstat(file.fileno()).st_size) != size:
                raise StorageError(
                    f"{self._step.store.url}/{name} is cut off: expected {size} bytes, found "
                    f"{found}"
                )
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in tar:
                        key, _, extension = member.name.partition(".")
                        place = extension, member.offset_data, member.size
                        members.setdefault(key, []).append(place)
            except tarfile.TarError as error:
                raise StorageError(f"{name} is not a shard of ovref: {error}") from error
        return name, members
