"""Step folders: the shards of one step, the fingerprint they belong to and what is committed.

    <step>/step.json                        fingerprint, identity, parents, format version
    <step>/_commits/<shard>.json            the marker: its existence is the commit
    <step>/<shard>-<hash>.tar               the records (see `codec`); none for references
    <step>/<shard>-<hash>.parquet           the sidecar: one row a record
    <step>/<shard>-<hash>.drops.jsonl       what was dropped and why; absent if nothing was
    <step>/complete.json                    the names of all shards, once the list is final

A marker names its files with their checksums; readers trust only what a marker names. Equal
records give equal bytes and so equal names, and of any number of attempts one makes the marker.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ovref.contract import Dropped
from ovref.storage.codec import Record
from ovref.storage.store import Store

FORMAT_VERSION = 1


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
    """Of the step."""
    files: tuple[StoredFile, ...]
    inputs: int
    """Records read."""
    outputs: int
    """Records written."""
    dropped: dict[str, int]
    """Whole inputs given up, by reason."""
    dropped_parts: dict[str, int]
    """Parts of inputs (regions) given up, by reason."""
    seconds: float
    """From the first record read to the upload; wall clock."""
    attempt: int
    """0 for the first."""


def open_step(
    store: Store, name: str, identity: dict[str, Any], parents: list[str] | tuple[str, ...] = ()
) -> "StepFolder":
    """The folder `name` of a store, made if it is new and checked if it is not.

    Args:
        identity: all values that affect the bytes of the step (`identity.spec_identity` of its
            stages, the corpus, the run seed, the shard size), in canonical types.
        parents: fingerprints of the steps it reads from.

    Raises:
        MismatchError: the folder was written under another identity or parents; the message
            lists the values that differ.
        StorageError: the store cannot be written, or step.json is damaged.
    """
    raise NotImplementedError


def existing_step(store: Store, name: str) -> "StepFolder":
    """The folder `name` as it was written, whatever its identity; for looking and for `reduce`.

    Raises:
        StorageError: there is no such step.
    """
    raise NotImplementedError


@dataclass(frozen=True)
class StepFolder:
    """One step's place in a store. Picklable; made by `open_step` or `existing_step`."""

    store: Store
    """Rooted at the step's folder."""
    name: str
    fingerprint: str
    identity: dict[str, Any]
    parents: tuple[str, ...]

    def committed(self) -> list[str]:
        """Names of the committed shards, sorted: one listing, no reads. The resume state."""
        raise NotImplementedError

    def commit_of(self, shard: str) -> Commit | None:
        """The marker of a shard, or None if it is not committed."""
        raise NotImplementedError

    def commits(self) -> dict[str, Commit]:
        """All markers by shard, in the order of the names."""
        raise NotImplementedError

    def finish(self, shards: list[str]) -> None:
        """Declares that these are all the shards of the step; refuses if one is not committed."""
        raise NotImplementedError

    def complete(self) -> list[str] | None:
        """Names of all the shards of the step, or None while that is not yet known."""
        raise NotImplementedError

    def read(self, shard: str) -> Iterator[Record]:
        """The records of a committed shard, in order; checksums are compared before the first.

        Raises:
            StorageError: the shard is not committed, or a file is missing, cut off or another's.
        """
        raise NotImplementedError

    def table(self, shard: str, columns: list[str] | None = None) -> pa.Table:
        """The sidecar of a committed shard (`codec.COLUMNS`). Raises StorageError like `read`.

        A shard without outputs gives a table with the column `key` alone and no rows.
        """
        raise NotImplementedError

    def drops(self, shard: str) -> list[Dropped]:
        """What was dropped from a committed shard, sorted by key. Raises StorageError."""
        raise NotImplementedError

    def writer(self, shard: str) -> "ShardWriter":  # noqa: F821
        """A context manager that takes the records of one shard and commits them."""
        raise NotImplementedError

    def commit(
        self, shard: str, records: Iterable[Record], *, inputs: int, drops: Iterable[Dropped] = ()
    ) -> Commit:
        """Writes and commits a shard in one call. Returns the marker that stands in the end."""
        raise NotImplementedError

    def orphans(self) -> list[str]:
        """Files that no marker names: left by killed attempts and lost races."""
        raise NotImplementedError

    def collect_garbage(self, older_than_s: float = 86400.0) -> list[str]:
        """Deletes the orphans that are old enough to belong to no running attempt; names them."""
        raise NotImplementedError
