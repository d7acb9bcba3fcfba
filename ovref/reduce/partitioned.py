"""Reference shards to a partitioned collection, without a machine that holds all of them.

    counts, nouns, plan, scattered    `scatter`           <collection>/_scatter/<hash>/<step>/
    partitions                        `run`, one a task   <collection>/partitions/<leaf>-<hash>/
    lists                             `list_index`        <collection>/_scatter/<hash>/lists/
    manifest                          names the partitions; written last: the collection

Every task commits its result on the store, so that a killed reduction resumes task by task, on any
machines that see the store. When a collection grows, its tree sends new references to partitions,
and only partitions with new references or new deletions are made again, in new folders, so that
readers see the old collection until the manifest is replaced.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ovref.ahead import map_ahead
from ovref.errors import MismatchError, StorageError
from ovref.identity import fingerprint, spec_identity
from ovref.reduce.filter import NothingKeptError
from ovref.reduce.grow import check_same_encoders
from ovref.reduce.inputs import Divisible, dropped_before, new_shards, no_references
from ovref.reduce.list_index import (
    has_list_index,
    make_list_index,
    partition_indexes,
    read_info,
)
from ovref.reduce.made_from import MadeFrom
from ovref.reduce.partition_tree import Tree, read_tree
from ovref.reduce.partitions import Part, copy_partition, filtered, reduce_leaf, summary_of
from ovref.reduce.phases import Report, RunTasks, Task, one_at_a_time
from ovref.reduce.published import (
    SCATTER,
    Published,
    already_published,
    read_published,
    remove_leftovers,
)
from ovref.reduce.run import changed_meanwhile
from ovref.reduce.scatter import (
    GROUP_ROWS,
    NOUNS_A_TASK,
    PLAN,
    EmbedNouns,
    PartitionReferences,
    count_nouns,
    encode_each,
    encode_nouns,
    groups_of,
    make_plan,
    planned_sizes,
    read_ahead,
    scatter,
    total_counts,
    vocabulary,
)
from ovref.reduce.spec import ReduceSpec
from ovref.storage.file_store import Store, check_conditional_create
from ovref.storage.scratch import scratch_folder
from ovref.storage.steps import StepFolder, open_step
from ovref_inference.collection import format as fmt
from ovref_inference.collection import store as collections
from ovref_inference.collection.retrieve import Texts
from ovref_inference.places import sha256_of


def reduce_partitioned(
    steps: Sequence[StepFolder],
    spec: ReduceSpec,
    *,
    made_from: MadeFrom,
    texts: Texts,
    output: Store,
    work: Path,
    base: Store | None,
    replace: bool,
    allow_incomplete: bool,
    run_tasks: RunTasks,
    report: Report,
) -> dict[str, Any]:
    """Makes a partitioned collection; see `collection.reduce_collection`."""
    before = read_published(output, replace=replace)
    grown = None if base is None else _open_grown(base, made_from)
    known = [] if grown is None else grown.manifest.build["inputs"]
    inputs = [new_shards(step, made_from, known, allow_incomplete) for step in steps]
    if grown is None and not any(shards.rows for shards in inputs):
        raise no_references(inputs)
    job = PartitionedJob(
        inputs=inputs, spec=spec, made_from=made_from,
        embed_nouns=partial(encode_each, texts, made_from.templates), output=output,
        before=before, work=work, run_tasks=run_tasks, report=report, grown=grown, replace=replace,
    )  # fmt: skip
    return make_partitions(job)


@dataclass(frozen=True)
class Grown:
    """The partitioned collection that is being grown."""

    store: Store
    published: Published
    manifest: fmt.PartitionedManifest
    tree: Tree

    @property
    def changed(self) -> bool:
        """Whether it is no longer there as it was opened."""
        return read_published(self.store) != self.published

    def leaf_of_each_noun(self) -> pa.Table:
        """Columns `noun` and `leaf`, int32."""

        def nouns_of(number: int) -> pa.Table:
            file = self.published.partitions[number].files["nouns"]
            path = f"{self.manifest.partitions[number].path}/{file.path}"
            with self.store.by_ranges(path, file.bytes) as opened:
                table = pq.read_table(opened, columns=["noun"], use_threads=False)
            leaf = pa.array(np.full(len(table), leaf_of[number], np.int32))
            return table.append_column("leaf", leaf)

        leaf_of = {number: leaf for leaf, number in enumerate(self.tree.partitions.tolist())}
        return pa.concat_tables(map_ahead(nouns_of, range(len(self.published.partitions))))


@dataclass(frozen=True, kw_only=True)
class PartitionedJob:
    """What a partitioned collection is made of, and where."""

    inputs: Sequence[Divisible]
    spec: ReduceSpec
    made_from: MadeFrom
    embed_nouns: EmbedNouns
    output: Store
    before: Published | None
    """What was at `output` before the inputs were looked at."""
    work: Path
    run_tasks: RunTasks
    report: Report
    grown: Grown | None = None
    replace: bool = False
    build: Mapping[str, Any] = field(default_factory=dict)
    """For the manifest's `build`, in place of what it would say."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """Likewise for its summary."""

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that affects the collection's bytes."""
        base = self.grown.manifest if self.grown else None
        parts = self.grown.published.partitions if self.grown else ()
        return {
            "format_version": fmt.PARTITIONED_VERSION,
            "reduce": spec_identity(self.spec),
            "embed": self.made_from.embed,
            "inputs": [found for one in self.inputs if (found := one.identity)],
            "base": base.fingerprint if base else None,
            "tombstones": [part.files["tombstones"].sha256 for part in parts],
            "licences": self.made_from.licences_with(base),
        }

    @cached_property
    def wanted(self) -> str:
        """Fingerprint of the collection."""
        return fingerprint(self.identity)

    def standing(self) -> dict[str, Any] | None:
        """The summary of the collection if it is at `output` already."""
        made = already_published(
            self.output, self.wanted, self.grown.manifest if self.grown else None, self.spec,
            nothing_new=not self.identity["inputs"], replace=self.replace,
        )  # fmt: skip
        if made is None:
            return None
        remove_leftovers(self.output)  # of a reduction that was killed after its last commit
        same = made.manifest.fingerprint == self.wanted
        return made.summary(**({} if same else {"added": 0}))

    def check_unchanged(self) -> None:
        """Raises MismatchError if anything that it was made of, or that it replaces, is another."""
        if read_published(self.output, replace=self.replace) != self.before:
            raise changed_meanwhile(self.output.url)
        if self.grown and self.grown.changed:
            raise changed_meanwhile(self.grown.store.url)
        for one in self.inputs:
            if one.changed:
                raise changed_meanwhile(one.where)

    def step(self, name: str) -> StepFolder:
        """One of the steps of `scatter`, created if it is not there."""
        place = fingerprint([self.wanted, GROUP_ROWS, NOUNS_A_TASK])[:16]
        identity = {"collection": self.wanted}
        return open_step(self.output.child(f"{SCATTER}/{place}"), name, identity)

    def run(self, step: StepFolder, tasks: Mapping[str, Task]) -> None:
        """Runs the tasks of the shards that a step lacks."""
        there = set(step.committed())
        missing = [task for name, task in tasks.items() if name not in there]
        for done, _ in enumerate(self.run_tasks(missing), start=len(tasks) - len(missing) + 1):
            self.report(step.name, done, len(tasks))


def make_partitions(job: PartitionedJob) -> dict[str, Any]:
    """Makes and publishes the collection, unless it is there; see `collection.reduce_collection`
    for the result and the errors."""
    if (summary := job.standing()) is not None:
        return summary
    with one_at_a_time(job.work / f"{job.wanted[:16]}.lock", job.report):
        if (summary := job.standing()) is not None:
            return summary
        plan, tree = _planned(job)
        parts = _partitions(job, plan, tree)
        if not any(part.manifest for part in parts.values()):
            raise NothingKeptError(
                f"the filters leave none of the references of any partition: "
                f"{filtered(parts.values())}; relax the thresholds in `filter`"
            )
        numbers, made = _numbered(job, tree, parts)
        lists = _list_indexes(job, made)
        if (summary := job.standing()) is not None:  # made on another machine
            return summary
        job.check_unchanged()
        manifest = _publish(job, replace(tree, partitions=numbers), parts, made, lists)
        job.report("publish", 1, 1)
        remove_leftovers(job.output)
        return manifest.build["summary"] | {"fingerprint": job.wanted}


def _open_grown(base: Store, made_from: MadeFrom) -> Grown:
    published = read_published(base)
    if published is None or not isinstance(published.manifest, fmt.PartitionedManifest):
        raise MismatchError(f"there is no partitioned collection at {base.url} to grow")
    check_same_encoders(base.url, published.manifest, made_from)
    info = published.manifest.files["partition_tree"]
    where = f"{base.url}/{info.path}"
    with base.local_copy(info.path) as path:
        if sha256_of(path) != info.sha256:
            raise StorageError(f"{where} is not the file that the manifest names: it was damaged")
        return Grown(base, published, published.manifest, read_tree(path, where))


def _planned(job: PartitionedJob) -> tuple[StepFolder, Tree]:
    """The plan, whatever was committed of it before, and its tree."""
    counts, nouns, plan = (job.step(name) for name in ("counts", "nouns", "plan"))
    if plan.commit_of(PLAN) is None:
        check_conditional_create(job.output.child(SCATTER))
        groups = groups_of(job.inputs)
        job.run(counts, {n: partial(count_nouns, counts, n, g) for n, g in groups.items()})
        known = job.grown.leaf_of_each_noun() if job.grown else None
        found = vocabulary(total_counts(counts), known)
        new = found.column("noun").filter(pc.is_null(found.column("leaf"))).combine_chunks()
        tasks: dict[str, Task] = {}
        for start in range(0, len(new), NOUNS_A_TASK):
            # Copied, because a slice is sent with all that it is a slice of.
            some = new.take(pa.array(np.arange(start, min(start + NOUNS_A_TASK, len(new)))))
            name = f"{start:09d}"
            tasks[name] = partial(encode_nouns, nouns, name, some, job.embed_nouns)
        job.run(nouns, tasks)
        tree, most = job.grown.tree if job.grown else None, job.spec.partition_references or 0
        job.run(plan, {PLAN: partial(make_plan, plan, found, nouns, most, tree)})
    with plan.file(PLAN, "npz") as path:
        return plan, read_tree(path, plan.store.url)


def _partitions(job: PartitionedJob, plan: StepFolder, tree: Tree) -> dict[int, Part]:
    """The partition of every leaf that has references, made, copied or left as it is."""
    scattered, groups = job.step("scattered"), groups_of(job.inputs)
    job.run(scattered, {n: partial(scatter, scattered, n, g, plan) for n, g in groups.items()})
    sizes = planned_sizes(plan, tree.leaves)
    content = fingerprint([job.identity, plan.required(PLAN).files["parquet"].sha256])
    alone = replace(job.spec, partition_references=None)
    made_from = replace(job.made_from, licences=tuple(job.identity["licences"]))
    passed = any(one.passed_filters for one in job.inputs)
    numbers = tree.partitions if job.grown else np.full(tree.leaves, -1)
    parts: dict[int, Part] = {}
    tasks: dict[int, Task] = {}
    for leaf, number in enumerate(numbers.tolist()):
        base = None
        if job.grown and number >= 0:
            path = job.grown.manifest.partitions[number].path
            manifest = job.grown.published.partitions[number]
            base = job.grown.store.child(path)
            same = manifest.build["reduce"] == spec_identity(alone)
            if not sizes[leaf] and same and Published(manifest).settled:
                if job.grown.store == job.output:
                    parts[leaf] = Part(path, manifest, [])
                else:
                    tasks[leaf] = partial(copy_partition, base, job.output, path)
                continue
        elif not sizes[leaf]:
            continue
        references = PartitionReferences(
            scattered, tuple(groups), leaf, int(sizes[leaf]), content, read_ahead(tree.leaves),
            passed,
        )  # fmt: skip
        name = f"{leaf:05d}-{job.wanted[:12]}"
        tasks[leaf] = partial(
            reduce_leaf, references, plan, alone, made_from, job.output, name, base, job.work
        )
    total = len(parts) + len(tasks)
    for leaf, part in zip(tasks, job.run_tasks(list(tasks.values())), strict=True):
        parts[leaf] = part
        job.report("partitions", len(parts), total)
    return dict(sorted(parts.items()))


Made = Sequence[tuple[str, fmt.Manifest]]
"""Path and manifest of each partition, by its number."""


def _numbered(
    job: PartitionedJob, tree: Tree, parts: Mapping[int, Part]
) -> tuple[np.ndarray, Made]:
    """The number of the partition of each leaf, -1 of one without references."""
    numbers = tree.partitions.copy() if job.grown else np.full(tree.leaves, -1)
    for leaf, part in parts.items():
        if numbers[leaf] < 0 and part.manifest:
            numbers[leaf] = numbers.max() + 1
    leaves = sorted(np.flatnonzero(numbers >= 0).tolist(), key=numbers.__getitem__)
    made = [(part.path, part.manifest) for part in map(parts.__getitem__, leaves) if part.manifest]
    return numbers, made


def _list_indexes(job: PartitionedJob, made: Made) -> StepFolder | None:
    """The step with the indexes over the inverted lists of all partitions, made; None if these are
    few."""
    indexes = {role: partition_indexes(role, made) for role in fmt.LISTS}
    if not all(map(has_list_index, indexes.values())):
        return None
    step = job.step("lists")
    job.run(step, {
        role: partial(make_list_index, step, role, job.output, some, job.spec.seed)
        for role, some in indexes.items()
    })  # fmt: skip
    return step


def _publish(
    job: PartitionedJob, tree: Tree, parts: Mapping[int, Part], made: Made, lists: StepFolder | None
) -> fmt.PartitionedManifest:
    """Writes the tree and the indexes of `lists`, then the manifest."""
    manifests = [manifest for _, manifest in made]
    dims = manifests[0].visual.dim, manifests[0].textual.dim
    base = job.grown.manifest if job.grown else None
    before = base.counts["references"] if base else 0
    summary = summary_of(list(parts.values()), before) | {
        "dropped_before": dropped_before(job.inputs)
    }
    build = {
        "reduce": job.identity["reduce"],
        "embed": job.identity["embed"],
        "inputs": (base.build["inputs"] if base else []) + job.identity["inputs"],
        "base": job.identity["base"],
        "provenance": job.made_from.provenance_with(base),
        "summary": {**summary, **job.summary},
    }
    manifest = fmt.PartitionedManifest(
        fingerprint=job.wanted,
        **job.made_from.heading(job.spec, job.identity["licences"], *dims),
        build={**build, **job.build},
        partitions=tuple(
            fmt.PartitionInfo(
                path=path,
                fingerprint=one.fingerprint,
                references=one.counts["references"],
                nouns=one.counts["nouns"],
            )
            for path, one in made
        ),
    )
    with scratch_folder() as folder, contextlib.ExitStack() as opened:
        files = {"partition_tree": Path(folder, "partition_tree.npz")}
        tree.save(files["partition_tree"])
        if lists is not None:
            infos: dict[str, Any] = {role: read_info(lists, role) for role in fmt.LISTS}
            manifest = replace(manifest, **infos)
            for role in fmt.LISTS:
                files[role] = Path(folder, f"{role}.faiss")
                files[role].symlink_to(opened.enter_context(lists.file(role, "faiss")))
        return collections.publish_partitioned(
            job.output.url, manifest, files=files, storage_options=job.output.storage_options
        )
