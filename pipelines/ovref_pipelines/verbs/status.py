"""Describes a place: a build and its progress, one of its steps, or a collection.

Reads only listings, markers and manifests, so it works from any machine, during or after a build.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ovref.storage.file_store import Store
from ovref.storage.steps import COMMITS, STEP, StepFolder, existing_step
from ovref_inference import ReferenceCollection
from ovref_inference.collection import format as fmt
from ovref_inference.collection import store as collections
from ovref_pipelines import live
from ovref_pipelines.engine.ledger import QUARANTINE
from ovref_pipelines.engine.progress import duration
from ovref_pipelines.engine.summary import counts_text, filter_warnings, summarise
from ovref_pipelines.output import BuildOutput, open_build, quarantined_in

NAMED = 5
"""Maximum number of keys or shards in one line."""
NOUNS = 12
"""Maximum number of nouns shown of a collection."""


@dataclass(frozen=True, kw_only=True)
class StepStatus:
    """State of one step; the defaults are of one that has not begun."""

    step: str
    output: str
    """URL of the step's folder."""
    begun: bool = False
    complete: bool = False
    shards: int | None
    """Total number; None while the previous step does not know it."""
    committed: int = 0
    missing: int | None
    """Shards not committed, with those in quarantine."""
    quarantined: tuple[str, ...] = ()
    """Shards that failed permanently in the last run; the next run retries them."""
    inputs: int = 0
    outputs: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """Whole records dropped, by reason."""
    dropped_parts: dict[str, int] = field(default_factory=dict)
    """Regions dropped, by reason."""
    last_commit_age_s: float | None = None
    work_seconds: float = 0.0


def place_text(url: str) -> str:
    """Description of a URL, for people.

    Raises:
        InputError: it is neither a build's output, nor one of its steps, nor a collection.
    """
    store = Store.open(url)
    if store.exists(fmt.MANIFEST):
        return _collection_text(store)
    if store.exists(STEP):
        return "\n".join(_lines_of(_lone_step(store)))
    build = open_build(url)
    lines = [line for step in status(build) for line in _lines_of(step)]
    if (now := live.read(build.store)) is not None and now["state"] == "running":
        lines.insert(0, f"running, {duration(now['age_seconds'])} ago: {live.text(now)}")
    if build.upstream != build.store:
        lines.insert(0, f"images come from {build.upstream.url}")
    if not build.is_published:
        return "\n".join([*lines, f"collection: none yet at {build.collection.url}"])
    return "\n".join([*lines, *_manifest_lines(build.collection)])


def place_json(url: str) -> str:
    """Description of a URL, for programs. Raises InputError like `place_text`."""
    store = Store.open(url)
    tree: dict[str, Any]
    if store.exists(fmt.MANIFEST):
        tree = {"collection": store.url, "counts": _manifests(store)[1]}
    elif store.exists(STEP):
        tree = {"steps": [asdict(_lone_step(store))]}
    else:
        build = open_build(url)
        tree = {
            "output": build.store.url,
            "steps": [asdict(step) for step in status(build)],
            "collection": build.collection.url if build.is_published else None,
            "progress": live.read(build.store),
        }
    return json.dumps(tree, indent=1, ensure_ascii=False)


def status(build: BuildOutput) -> list[StepStatus]:
    """State of each step, from listings and markers."""
    found, shards = [], None
    for name in build.steps:
        if not build.has(name):
            url = build.place(name).child(name).url
            found.append(StepStatus(step=name, output=url, shards=shards, missing=shards))
            continue
        step = build.step(name)
        complete = step.complete()
        if complete is not None:
            shards = len(complete)
        found.append(_status_of(step, shards, complete is not None))
    return found


def _lone_step(store: Store) -> StepStatus:
    parent, _, name = store.url.rpartition("/")
    step = existing_step(Store.open(parent or "/"), name)
    complete = step.complete()
    return _status_of(step, None if complete is None else len(complete), complete is not None)


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
            f"{QUARANTINE}, the next build retries them"
        )


def some(names: Sequence[str]) -> str:
    """The first few names in one line."""
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _manifests(store: Store) -> tuple[list[fmt.Manifest], dict[str, int]]:
    """The manifest of a collection, or those of its partitions, and the counts of the whole."""
    options = {"storage_options": store.storage_options}
    manifest = collections.read_manifest(store.url, **options)
    if isinstance(manifest, fmt.Manifest):
        return [manifest], manifest.counts
    parts = collections.read_partitions(store.url, manifest, **options)
    deleted = sum(part.counts["tombstones"] for part in parts)
    return parts, manifest.counts | {"tombstones": deleted}


def _manifest_lines(store: Store) -> list[str]:
    manifest = collections.read_manifest(store.url, storage_options=store.storage_options)
    parts, counts = _manifests(store)
    lines = [f"collection: {store.url}, {counts_text(counts)}"]
    if isinstance(manifest, fmt.PartitionedManifest):
        most = max(part.counts["references"] for part in parts)
        lines.append(f"  partitions: {len(parts)}, of at most {most} references")
    for name in ("visual", "textual"):
        encoder = getattr(manifest, name)
        indexes = sorted({getattr(part, f"{name}_index").factory for part in parts})
        lines.append(f"  {name}: {encoder.model}, {encoder.dim} wide, index {', '.join(indexes)}")
    lines += [f"  WARNING: {text}" for text in filter_warnings(manifest.build.get("summary") or {})]
    return [*lines, f"  fingerprint: {manifest.fingerprint}"]


def _collection_text(store: Store) -> str:
    with ReferenceCollection.open(store.url) as collection:
        counts = dict(zip(collection.nouns, collection.noun_counts.tolist(), strict=True))
    most = sorted(counts, key=lambda name: (counts[name], name), reverse=True)[:NOUNS]
    nouns = ", ".join(f"{name} ({counts[name]})" for name in most)
    return "\n".join([*_manifest_lines(store), f"  most frequent nouns: {nouns}"])
