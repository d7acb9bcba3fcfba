"""Deletes the leftovers of killed attempts in the output of a build: files that no marker names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ovref.storage.file_store import Store
from ovref_pipelines.engine.progress import duration
from ovref_pipelines.output import BuildOutput


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """One file that no marker names."""

    url: str
    size: int
    age_s: float


def collect_garbage(build: BuildOutput, older_than_s: float, *, dry_run: bool) -> list[Garbage]:
    """Deletes leftovers of killed attempts and lost races in the steps of this output, and those of
    killed publishing beside its collection.

    Args:
        older_than_s: must exceed the time of an attempt at a shard: no marker names the files of
            a running attempt yet.
        dry_run: only list them.
    """
    garbage = []
    for name in build.steps:
        if not (build.is_own(name) and build.has(name)):
            continue
        step = build.step(name)
        details = step.store.details(unfinished=True)
        if dry_run:
            paths = [
                path
                for path in step.orphans()
                if path in details and details[path].age_s >= older_than_s
            ]
        else:
            paths = [path for path in step.collect_garbage(older_than_s) if path in details]
        garbage += [
            Garbage(
                url=f"{step.store.url}/{path}",
                size=details[path].size,
                age_s=round(details[path].age_s, 1),
            )
            for path in paths
        ]
    return garbage + unpublished(build.collection, older_than_s, dry_run=dry_run)


def is_scratch(path: str) -> bool:
    """Whether `path` is an unfinished file of publishing a collection, or a partition, here."""
    return re.fullmatch(r"(partitions/[^/]+/)?[^/]+\.[0-9a-f]+\.tmp", path) is not None


def unpublished(collection: Store, older_than_s: float, *, dry_run: bool) -> list[Garbage]:
    """Deletes leftovers of killed publishing beside a collection; see `collect_garbage`."""
    garbage = []
    for path, details in collection.details().items():
        if collection.is_local and is_scratch(path) and details.age_s >= older_than_s:
            if not dry_run:
                collection.delete(path)
            url, age_s = f"{collection.url}/{path}", round(details.age_s, 1)
            garbage.append(Garbage(url=url, size=details.size, age_s=age_s))
    return garbage


def garbage_text(garbage: Sequence[Garbage], dry_run: bool) -> str:
    """`collect_garbage` for people: each file with its size and age, and the sum."""
    lines = [f"{item.url}  {item.size} bytes, {duration(item.age_s)} old" for item in garbage]
    what = "would be deleted" if dry_run else "deleted"
    total = sum(item.size for item in garbage)
    return "\n".join([*lines, f"{len(garbage)} files of {total} bytes {what}"])
