"""Looking after the output of a build: where it stands, and what may be deleted.

Both read what is in the store and nothing else, so they can be asked from any machine, while a
build runs or long after. Only `collect_garbage` deletes, and only what no marker names.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from ovref.storage.steps import COMMITS, StepFolder, existing_step
from ovref.storage.store import Store
from ovref_pipelines.engine.ledger import QUARANTINE
from ovref_pipelines.engine.progress import duration
from ovref_pipelines.engine.summary import summarise
from ovref_pipelines.output import Build, is_published, quarantined_in

NAMED = 5
"""Keys or shards named in one line."""


@dataclass(frozen=True, kw_only=True)
class StepStatus:
    """Where one step stands."""

    step: str
    output: str
    """URL of the step's folder."""
    begun: bool
    complete: bool
    shards: int | None
    """In the end; None while the step before it does not know."""
    committed: int
    missing: int | None
    """Shards not committed, with those in quarantine."""
    quarantined: tuple[str, ...]
    """Shards that failed for good in the last run; the next run tries them again."""
    inputs: int
    outputs: int
    dropped: dict[str, int]
    """Whole records given up, by reason."""
    dropped_parts: dict[str, int]
    """Regions given up, by reason."""
    last_commit_age_s: float | None
    work_seconds: float


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """One file that no marker names."""

    url: str
    size: int
    age_s: float


# -- status ------------------------------------------------------------------------------------


def status(build: Build) -> list[StepStatus]:
    """Where each step stands, from listings and markers alone."""
    found, shards = [], None
    for name in build.places:
        if not build.has(name):
            place = build.places[name].child(name)
            found.append(_not_begun(name, place.url, shards))
            continue
        step = existing_step(build.places[name], name)
        complete = step.complete()
        if complete is not None:
            shards = len(complete)
        found.append(_status_of(step, shards, complete is not None))
    return found


def status_json(steps: Sequence[StepStatus], build: Build) -> str:
    """`status` for programs."""
    tree = {
        "output": build.store.url,
        "steps": [asdict(step) for step in steps],
        "collection": build.collection if is_published(build) else None,
    }
    return json.dumps(tree, indent=1, ensure_ascii=False)


def status_text(steps: Sequence[StepStatus], build: Build) -> str:
    """`status` for people."""
    lines = [line for step in steps for line in _lines_of(step)]
    published = "" if is_published(build) else "none yet at "
    return "\n".join([*lines, f"collection: {published}{build.collection}"])


def _status_of(step: StepFolder, shards: int | None, complete: bool) -> StepStatus:
    counts = summarise(step, 0)
    ages = [details.age_s for details in step.store.details(COMMITS).values()]
    return StepStatus(
        step=step.name,
        output=step.store.url,
        begun=True,
        complete=complete,
        shards=shards,
        committed=counts.committed,
        missing=None if shards is None else shards - counts.committed,
        quarantined=tuple(quarantined_in(step)),
        inputs=counts.inputs,
        outputs=counts.outputs,
        dropped=counts.dropped,
        dropped_parts=counts.dropped_parts,
        last_commit_age_s=round(min(ages), 1) if ages else None,
        work_seconds=counts.work_seconds,
    )


def _not_begun(name: str, url: str, shards: int | None) -> StepStatus:
    return StepStatus(
        step=name, output=url, begun=False, complete=False, shards=shards, committed=0,
        missing=shards, quarantined=(), inputs=0, outputs=0, dropped={}, dropped_parts={},
        last_commit_age_s=None, work_seconds=0.0,
    )  # fmt: skip


def _lines_of(step: StepStatus) -> Iterator[str]:
    if not step.begun:
        yield f"{step.step}: not begun"
        return
    parts = [f"{step.committed} of {'?' if step.shards is None else step.shards} shards committed"]
    if step.missing:
        parts.append(f"{step.missing} missing")
    if step.quarantined:
        parts.append(f"{len(step.quarantined)} quarantined")
    if step.complete:
        parts.append("complete")
    parts.append(f"{step.inputs} records in, {step.outputs} out")
    if step.last_commit_age_s is not None:
        parts.append(f"last commit {duration(step.last_commit_age_s)} ago")
    yield f"{step.step}: {', '.join(parts)}"
    for what, counts in (("dropped", step.dropped), ("parts dropped", step.dropped_parts)):
        if counts:
            yield f"  {what}: {', '.join(f'{n} {reason}' for reason, n in counts.items())}"
    if step.quarantined:
        yield (
            f"  quarantined: {some(step.quarantined)}; tracebacks are in {step.output}/"
            f"{QUARANTINE}, the next build tries them again"
        )


# -- garbage -----------------------------------------------------------------------------------


def collect_garbage(build: Build, older_than_s: float, *, dry_run: bool) -> list[Garbage]:
    """Deletes what killed attempts and lost races have left in the steps of this output, and what
    killed publishings have left beside its collection.

    Args:
        older_than_s: must be more than an attempt at a shard can take: the files of a running one
            are not named by a marker yet.
        dry_run: only name them.
    """
    garbage = []
    for name in build.places:
        if not (build.is_own(name) and build.has(name)):
            continue
        step = existing_step(build.store, name)
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
    garbage += _unpublished(Store.open(build.collection), older_than_s, dry_run)
    return garbage


def is_scratch(path: str) -> bool:
    """Whether `path` is that of a file that publishing a collection here has not completed."""
    return re.fullmatch(r"[^/]+\.[0-9]+\.tmp", path) is not None


def _unpublished(collection: Store, older_than_s: float, dry_run: bool) -> Iterator[Garbage]:
    """What a publishing that was killed has left beside a collection."""
    for path, details in collection.details().items():
        if collection.is_local and is_scratch(path) and details.age_s >= older_than_s:
            if not dry_run:
                collection.delete(path)
            url, age_s = f"{collection.url}/{path}", round(details.age_s, 1)
            yield Garbage(url=url, size=details.size, age_s=age_s)


def garbage_text(garbage: Sequence[Garbage], dry_run: bool) -> str:
    """`collect_garbage` for people: each file with its size and age, and the sum."""
    lines = [f"{item.url}  {item.size} bytes, {duration(item.age_s)} old" for item in garbage]
    what = "would be deleted" if dry_run else "deleted"
    total = sum(item.size for item in garbage)
    return "\n".join([*lines, f"{len(garbage)} files of {total} bytes {what}"])


def some(names: Sequence[str]) -> str:
    """The first few names in one line."""
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
