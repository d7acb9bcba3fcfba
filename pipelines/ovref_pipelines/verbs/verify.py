"""Verifies the output of a build: every file, every input, every list.

Everything is read and compared with what was committed; nothing is written.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ovref.ahead import map_ahead
from ovref.contract import Dropped, base_key
from ovref.errors import MismatchError, StorageError
from ovref.storage.codec import is_part
from ovref.storage.commits import Commit, StoredFile
from ovref.storage.file_store import Store
from ovref.storage.scratch import scratch_folder
from ovref.storage.shards import read_drops
from ovref.storage.steps import StepFolder
from ovref_inference import ReferenceCollection
from ovref_inference.collection import format as fmt
from ovref_inference.errors import CollectionError
from ovref_inference.places import sha256_of
from ovref_pipelines.output import open_build, quarantined_in
from ovref_pipelines.verbs.status import some

DAMAGED = (StorageError, MismatchError, KeyError, TypeError, ValueError, pa.ArrowException)
"""Exceptions that reading a damaged file of a step raises."""


def verify(url: str) -> list[str]:
    """Problems of a build's output, or of a collection; empty if there are none.

    Compares every file that a marker names with its size and SHA-256, the keys of every shard with
    those of its source shard, and the lists of shards with each other; an unfinished step or
    collection is a problem too. Reads everything.

    Raises:
        InputError: there is neither a build nor a collection at `url`.
    """
    if Store.open(url).exists(fmt.MANIFEST):
        return _verify_collection(url)
    build = open_build(url)
    problems: list[str] = []
    source: Checked | None = None
    for name in build.steps:
        if not build.has(name):
            problems.append(f"{name}: there is no such step at {build.place(name).url}")
            source = None
            continue
        try:
            step = build.step(name)
        except DAMAGED as error:
            problems.append(f"{name}: {_describe(error)}")
            source = None
            continue
        source = _verify_step(step, source, problems)
    if build.is_published:
        problems += _verify_collection(build.collection.url)
    else:
        problems.append(f"collection: there is none at {build.collection.url}")
    return problems


@dataclass(frozen=True)
class Checked:
    """A verified step, for checking the next one against."""

    step: StepFolder
    keys: dict[str, pa.Array]
    """Keys of the records of each readable shard."""
    shards: list[str]
    """All shards of the step; the committed ones if the step is not complete."""


def _verify_step(step: StepFolder, source: Checked | None, problems: list[str]) -> Checked:
    def wrong(message: str) -> None:
        problems.append(f"{step.name}: {message}")

    committed = step.committed()
    shards = committed
    try:
        complete = step.complete()
        shards = committed if complete is None else complete
        if complete is None:
            of = "" if source is None else f" of {len(source.shards)}"
            wrong(f"not complete: {len(committed)}{of} shards are committed")
    except DAMAGED as error:
        wrong(_describe(error))
    if lost := sorted(set(shards) - set(committed)):
        wrong(f"{len(lost)} shards of its complete list have no marker: {some(lost)}")
    if extra := sorted(set(committed) - set(shards)):
        wrong(f"{len(extra)} shards are not in its complete list: {some(extra)}")
    if quarantined := quarantined_in(step):
        wrong(f"{len(quarantined)} shards failed permanently: {some(quarantined)}")
    if source is not None:
        if step.parents != (source.step.fingerprint,):
            wrong(f"it was made from other shards than those of {source.step.store.url}")
        if unknown := sorted(set(committed) - set(source.shards)):
            wrong(f"{len(unknown)} shards are not in {source.step.name}: {some(unknown)}")
        if unmade := sorted(set(source.shards) - set(shards)):
            wrong(f"{len(unmade)} shards of {source.step.name} are missing: {some(unmade)}")

    keys: dict[str, pa.Array] = {}
    checked = map_ahead(partial(_verify_shard, step, source), committed)
    for shard, (found, complaints) in zip(committed, checked, strict=True):
        for complaint in complaints:
            wrong(f"shard {shard}: {complaint}")
        if found is not None:
            keys[shard] = found
    return Checked(step, keys, shards)


def _verify_shard(
    step: StepFolder, source: Checked | None, shard: str
) -> tuple[pa.Array | None, list[str]]:
    """The keys of the shard's records, None if they cannot be read; and what is wrong with it."""
    try:
        commit = step.commit_of(shard)
    except DAMAGED as error:
        return None, [_describe(error)]
    if commit is None:
        return None, ["its marker was deleted meanwhile"]
    complaints: list[str] = []
    keys: pa.Array | None = None
    drops: list[Dropped] = []
    for extension, file in commit.files.items():
        try:
            with step.store.local_copy(file.name) as path:
                if complaint := _differs(path, file):
                    complaints.append(f"{step.store.url}/{file.name} {complaint}")
                elif extension == "parquet":
                    keys = _keys(path)
                elif extension == "drops.jsonl":
                    drops = read_drops(path.read_bytes())
        except DAMAGED as error:
            complaints.append(_describe(error))
    if not complaints:
        complaints = list(_unanswered(commit, keys, drops, source))
    return keys, complaints


def _unanswered(
    commit: Commit, keys: pa.Array | None, drops: list[Dropped], source: Checked | None
) -> Iterator[str]:
    """Inconsistencies between a marker's counts, the keys of its files and those of its source."""
    if keys is None:
        yield "its marker names no sidecar"
        return
    if len(keys) != commit.outputs:
        yield f"its marker counts {commit.outputs} records, the sidecar holds {len(keys)}"
    counted = sum(commit.dropped.values()) + sum(commit.dropped_parts.values())
    if counted != len(drops):
        yield f"its marker counts {counted} drops, the list holds {len(drops)}"
    if source is None:  # captions: one input is one record or one drop
        whole = sum(not is_part(drop.key) for drop in drops)
        if commit.inputs != len(keys) + whole:
            yield f"{commit.inputs} inputs gave {len(keys)} records and {whole} drops"
        return
    given = source.keys.get(commit.shard)
    if given is None:  # the source shard is damaged or missing, which was reported already
        return
    if commit.inputs != len(given):
        yield f"its marker counts {commit.inputs} inputs, {source.step.name} gave {len(given)}"
    answered = {base_key(key) for key in keys.to_pylist()} | {base_key(drop.key) for drop in drops}
    if missing := sorted(set(given.to_pylist()) - answered):
        yield f"{len(missing)} inputs were not answered: {some(missing)}"
    if unknown := sorted(answered - set(given.to_pylist())):
        yield f"{len(unknown)} answers are to inputs it was not given: {some(unknown)}"


def _differs(path: Path, file: StoredFile) -> str | None:
    size = path.stat().st_size
    if size != file.size:
        return f"has {size} bytes, {file.size} were committed"
    return None if sha256_of(path) == file.sha256 else "has other content than was committed"


def _keys(path: Path) -> pa.Array:
    with open(path, "rb") as file:
        return pq.read_table(file, columns=["key"], use_threads=False).column(0).combine_chunks()


def _verify_collection(url: str) -> list[str]:
    # A fresh cache, because an earlier copy says nothing about the current files.
    with scratch_folder() as cache:
        try:
            ReferenceCollection.open(url, cache=cache, verify="full").close()
        except CollectionError as error:
            return [f"collection: {error}"]
    return []


def _describe(error: Exception) -> str:
    known = isinstance(error, StorageError | MismatchError)
    return str(error) if known else f"{type(error).__name__}: {error}"
