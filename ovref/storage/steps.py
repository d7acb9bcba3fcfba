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

import contextlib
import re
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ovref import identity as identities
from ovref.contract import Dropped
from ovref.errors import MismatchError, StorageError
from ovref.storage import codec
from ovref.storage.codec import Record
from ovref.storage.commits import (
    COMMITS,
    Commit,
    StoredFile,
    json_bytes,
    json_object,
    marker_path,
    parse_marker,
)
from ovref.storage.file_store import Store, is_unfinished
from ovref.storage.shards import ShardFiles, TableFile, read_drops, read_tar
from ovref_inference.places import sha256_of

FORMAT_VERSION = 1
"""Version of step.json, markers and shards; increased when older readers cannot read them."""

STEP, COMPLETE = "step.json", "complete.json"
STEP_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")


def open_step(
    store: Store,
    name: str,
    identity: dict[str, Any],
    parents: Sequence[str] = (),
    *,
    create: bool = True,
) -> "StepFolder":
    """Creates the folder `name` of a store, or opens it after checking its identity.

    A folder with other settings but without shards is started over.

    Args:
        identity: all values that affect the bytes of the step (`identity.spec_identity` of its
            stages, the corpus, the run seed, the shard size), of the types that
            `identity.fingerprint` takes.
        parents: fingerprints of the steps that it reads from.
        create: if False, nothing is written, and a missing step counts as one without shards.

    Raises:
        MismatchError: the folder was written under another identity or other parents; the
            message lists the values that differ.
        StorageError: the store cannot be written, or step.json is damaged.
    """
    wanted = {
        "fingerprint": _fingerprint(identity, parents),
        "format_version": FORMAT_VERSION,
        "identity": identities.canonical(identity),
        "parents": list(parents),
    }
    place = _step_store(store, name)
    new = place.create(STEP, json_bytes(wanted)) if create else not place.exists(STEP)
    if new:
        return _folder(place, name, wanted)
    found = _read_step(place)
    if found["fingerprint"] != wanted["fingerprint"]:
        if not _folder(place, name, found).committed():
            # Left by a command that was corrected since: nothing is lost.
            if create:
                place.write(STEP, json_bytes(wanted))
            return _folder(place, name, wanted)
        changes = identities.changes(found["identity"], wanted["identity"])
        if found["parents"] != wanted["parents"]:
            changes.append("the step that it reads from has another fingerprint")
        raise MismatchError(
            f"{place.url} was made with other settings: {'; '.join(changes)}. Choose another "
            "output folder, or set these values as they were to resume this one"
        )
    return _folder(place, name, found)


def existing_step(store: Store, name: str) -> "StepFolder":
    """The folder `name` as it was written, whatever its identity.

    Raises:
        StorageError: there is no such step, or its step.json is damaged or of another version.
    """
    place = _step_store(store, name)
    return _folder(place, name, _read_step(place))


@dataclass(frozen=True)
class StepFolder:
    """One step's folder in a store, from `open_step` or `existing_step`. Picklable."""

    store: Store
    """Rooted at the step's folder."""
    name: str
    fingerprint: str
    identity: dict[str, Any]
    parents: tuple[str, ...]

    def committed(self) -> list[str]:
        """Names of the committed shards, sorted, from one listing. This is the resume state."""
        names = (Path(path).name for path in self.store.list(COMMITS))
        return [name.removesuffix(".json") for name in names if name.endswith(".json")]

    def commit_of(self, shard: str) -> Commit | None:
        """The marker of a shard, or None if it is not committed."""
        path = marker_path(shard)
        content = self.store.read_if_there(path)
        return None if content is None else self._commit(path, content)

    def commits(self) -> dict[str, Commit]:
        """All markers by shard, in order of name."""
        paths = [marker_path(shard) for shard in self.committed()]
        found = self.store.read_many(paths)
        commits = [self._commit(path, found[path]) for path in paths]
        return {commit.shard: commit for commit in commits}

    def finish(self, shards: Sequence[str]) -> None:
        """Declares that `shards`, all of them committed, are the whole step.

        Raises:
            StorageError: one of them is not committed, or another list was declared before.
        """
        missing = sorted(set(shards) - set(self.committed()))
        if missing:
            raise StorageError(
                f"{self.store.url} is not complete: {len(missing)} of {len(shards)} shards are not "
                f"committed, the first is {missing[0]}"
            )
        if not self.store.create(COMPLETE, json_bytes({"shards": list(shards)})):
            declared = self.complete() or []
            if declared != list(shards):
                raise StorageError(
                    f"{self.store.url} was declared complete with {len(declared)} shards, now "
                    f"with {len(shards)} others"
                )

    def take_back(self, shards: Sequence[str]) -> None:
        """Withdraws the commits of shards, so that they can be made again; the step is then
        incomplete. Their files become orphans. Nobody may write to the step meanwhile."""
        if not shards:
            return
        self.store.delete(COMPLETE)
        for shard in shards:
            self.store.delete(marker_path(shard))

    def complete(self) -> list[str] | None:
        """Names of all the shards of the step in order, or None while that is not known."""
        content = self.store.read_if_there(COMPLETE)
        if content is None:
            return None
        return json_object(content, f"{self.store.url}/{COMPLETE}")["shards"]

    def read(self, shard: str) -> Generator[Record, None, None]:
        """The records of a committed shard, in order, after verifying its checksums.

        Raises:
            StorageError: the shard is not committed, or a file is missing, cut off or another's.
        """
        commit = self.required(shard)
        if "tar" in commit.files:
            with self._verified(commit.files["tar"]) as path:
                yield from read_tar(path, f"{self.store.url}/{commit.files['tar'].name}")
        elif commit.outputs:
            yield from codec.references(self.table(shard))

    def table(self, shard: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The sidecar of a committed shard (`codec.COLUMNS`). Raises StorageError like `read`.

        A shard without outputs has only the column `key` and no rows.
        """
        commit = self.required(shard)
        wanted = list(columns) if columns and commit.outputs else None
        # As an open file, because pyarrow would infer partition columns from a path with '='.
        with self._verified(commit.files["parquet"]) as path, open(path, "rb") as file:
            return pq.read_table(file, columns=wanted, use_threads=False)

    @contextlib.contextmanager
    def table_by_ranges(self, shard: str) -> Iterator[pq.ParquetFile]:
        """The sidecar of a committed shard, of which only what is asked for is read. Its checksum
        is not compared. Raises StorageError."""
        found = self.required(shard).files["parquet"]
        try:
            with self.store.by_ranges(found.name, found.size) as file:
                yield pq.ParquetFile(file, pre_buffer=True)
        except (pa.ArrowInvalid, EOFError) as error:
            raise StorageError(
                f"{self.store.url}/{found.name} is not what was committed, {found.size} bytes of "
                f"Parquet: {error}"
            ) from error

    @contextlib.contextmanager
    def file(self, shard: str, extension: str) -> Iterator[Path]:
        """A file of a committed shard, on this machine. Raises StorageError like `read`."""
        with self._verified(self.required(shard).files[extension]) as path:
            yield path

    def drops(self, shard: str) -> list[Dropped]:
        """What was dropped from a committed shard, sorted by key. Raises StorageError."""
        commit = self.required(shard)
        if "drops.jsonl" not in commit.files:
            return []
        with self._verified(commit.files["drops.jsonl"]) as path:
            return read_drops(path.read_bytes())

    def commit(
        self, shard: str, records: Iterable[Record], *, inputs: int, drops: Sequence[Dropped] = ()
    ) -> Commit:
        """Writes and publishes a shard whose drops are known beforehand."""
        with ShardFiles() as files:
            for record in records:
                files.add(record)
            return self.publish(shard, files, inputs=inputs, drops=drops)

    def publish(
        self,
        shard: str,
        files: ShardFiles | TableFile,
        *,
        inputs: int,
        drops: Sequence[Dropped] = (),
        started: float | None = None,
        attempt: int = 0,
    ) -> Commit:
        """Publishes the files of a shard and creates its marker, unless it exists.

        Args:
            files: filled with the outputs; completed here.
            started: `time.monotonic()` at the first record, for the marker's `seconds`.

        Returns:
            The final marker: this attempt's, or that of a faster one.
        """
        path = marker_path(shard)
        if (earlier := self.commit_of(shard)) is not None:
            return earlier
        stored = {}
        for extension, local in sorted(files.finish(drops).items()):
            digest = sha256_of(local)
            name = f"{shard}-{digest[:16]}.{extension}"
            stored[extension] = StoredFile(name=name, sha256=digest, size=local.stat().st_size)
            self.store.upload(local, name)
        parts = [drop for drop in drops if codec.is_part(drop.key)]
        whole = [drop for drop in drops if not codec.is_part(drop.key)]
        commit = Commit(
            shard=shard,
            fingerprint=self.fingerprint,
            files=stored,
            inputs=inputs,
            outputs=files.count,
            dropped=_counted(whole),
            dropped_parts=_counted(parts),
            seconds=0.0 if started is None else round(time.monotonic() - started, 3),
            attempt=attempt,
        )
        self._check_still_ours()
        if self.store.create(path, json_bytes(asdict(commit))):
            return commit
        return self.required(shard)

    def _check_still_ours(self) -> None:
        """Raises MismatchError if another build has started the step over while it was empty."""
        where = f"{self.store.url}/{STEP}"
        if json_object(self.store.read(STEP), where).get("fingerprint") != self.fingerprint:
            raise MismatchError(
                f"{self.store.url} was started over with other settings by another build: "
                "give each build its own output"
            )

    def orphans(self) -> list[str]:
        """Files that no marker names: left by killed attempts and lost races."""
        # Listed before the markers are read, so that files committed meanwhile are not included.
        paths = self.store.list(unfinished=True)
        named = {file.name for commit in self.commits().values() for file in commit.files.values()}
        kept = {STEP, COMPLETE, *named}
        return [
            path for path in paths if is_unfinished(path) or ("/" not in path and path not in kept)
        ]

    def collect_garbage(self, older_than_s: float = 86400.0) -> list[str]:
        """Deletes the orphans older than `older_than_s` and names them.

        A running attempt has files that no marker names yet, so the age must exceed the time that
        one attempt at a shard can take.
        """
        deleted = []
        for path in self.orphans():
            # Checked last: a new attempt gives equal bytes the name of an old orphan.
            age_s = self.store.age_s(path)
            if age_s is not None and age_s >= older_than_s:
                self.store.delete(path)
                deleted.append(path)
        return deleted

    def required(self, shard: str) -> Commit:
        """The marker of a shard. Raises StorageError if the shard is not committed."""
        commit = self.commit_of(shard)
        if commit is None:
            raise StorageError(
                f"shard {shard} of {self.store.url} is not committed: run the step {self.name} "
                "before what reads it"
            )
        return commit

    def _commit(self, path: str, data: bytes) -> Commit:
        where = f"{self.store.url}/{path}"
        commit = parse_marker(data, where)
        if commit.fingerprint != self.fingerprint or path != marker_path(commit.shard):
            raise StorageError(
                f"{where} belongs to shard {commit.shard} of a step with the fingerprint "
                f"{commit.fingerprint}, expected {self.fingerprint}: was it copied from elsewhere?"
            )
        return commit

    @contextlib.contextmanager
    def _verified(self, file: StoredFile) -> Iterator[Path]:
        with self.store.local_copy(file.name) as path:
            size, digest = path.stat().st_size, sha256_of(path)
            if (size, digest) != (file.size, file.sha256):
                raise StorageError(
                    f"{self.store.url}/{file.name} is not what was committed: expected {file.size} "
                    f"bytes with SHA-256 {file.sha256}, found {size} bytes with {digest}; delete "
                    "the shard's marker in _commits/ to make it again"
                )
            yield path


def copy_shard(source: StepFolder, shard: str, target: StepFolder) -> None:
    """Copies the files that `read` needs, the marker last.

    Raises:
        StorageError: the shard is not committed, or a file is missing, cut off or another's.
    """
    files = source.required(shard).files
    file = files["tar" if "tar" in files else "parquet"]
    with source._verified(file) as path:
        target.store.upload(path, file.name)
    target.store.create(marker_path(shard), source.store.read(marker_path(shard)))


def _step_store(store: Store, name: str) -> Store:
    if not STEP_NAME.fullmatch(name):
        raise StorageError(f"a step's name must be lower-case words joined by '_', found {name!r}")
    return store.child(name)


def _fingerprint(identity: Any, parents: Sequence[str]) -> str:
    return identities.fingerprint(
        {"format_version": FORMAT_VERSION, "identity": identity, "parents": list(parents)}
    )


def _read_step(place: Store) -> dict[str, Any]:
    where = f"{place.url}/{STEP}"
    if not place.exists(STEP):
        raise StorageError(f"there is no step at {place.url}: {STEP} is missing")
    found = json_object(place.read(STEP), where)
    version = found.get("format_version")
    if version != FORMAT_VERSION:
        raise MismatchError(
            f"{where} is of format version {version}, this ovref writes {FORMAT_VERSION}: choose "
            "another output folder or use the ovref that made it"
        )
    if {"fingerprint", "identity", "parents"} - found.keys() or found[
        "fingerprint"
    ] != _fingerprint(found["identity"], found["parents"]):
        raise StorageError(f"{where} is damaged: its fingerprint is not that of its content")
    return found


def _folder(place: Store, name: str, step: dict[str, Any]) -> StepFolder:
    return StepFolder(place, name, step["fingerprint"], step["identity"], tuple(step["parents"]))


def _counted(drops: Sequence[Dropped]) -> dict[str, int]:
    return dict(sorted(Counter(drop.reason for drop in drops).items()))
