"""What people are shown: a plan before a build, a summary after it, what lies at a place."""

from pathlib import Path
from typing import Any

from ovref.errors import InputError
from ovref.records import ImageRecord
from ovref.storage.steps import STEP, StepFolder, existing_step
from ovref.storage.store import Store
from ovref_inference import ReferenceCollection
from ovref_inference.collection import format as fmt
from ovref_pipelines.engine.ledger import CRASHED, CRASHED_WORKER, QUARANTINE
from ovref_pipelines.engine.progress import duration
from ovref_pipelines.engine.summary import counts_text, step_line, summarise
from ovref_pipelines.output import STEPS, build_config
from ovref_pipelines.recipe import BuildSummary, Folders

SAMPLES = 6
"""Images in a picture of samples."""
NOUNS = 12
"""Nouns named of a collection."""


def build_summary(summary: BuildSummary) -> str:
    """What a build has made, and what it has not."""
    lines = [f"captions: {summary.ingested.captions} in {summary.ingested.shards} shards"]
    if summary.ingested.dropped:
        lines[0] += f"; dropped {counts_text(summary.ingested.dropped)}"
    lines += [step_line(step) for step in summary.steps]
    if summary.collection is not None:
        lines.append(collection_summary(summary.collection, summary.collection_url))
    for step in summary.steps:
        if crashed := step.dropped.get(CRASHED_WORKER):
            lines.append(
                f"{crashed} records of {step.step} killed their workers and were left out; the "
                f"reasons are in {step.output}/{CRASHED}. When the cause is mended, "
                "`ovref retry-failed` makes them again"
            )
        if step.quarantined:
            lines.append(
                f"FAILED: {len(step.quarantined)} shards of {step.step}; tracebacks are in "
                f"{step.output}/{QUARANTINE}. The same command tries them again"
            )
    if summary.collection is None:
        lines.append(
            "No collection was published because shards are missing; "
            "allow_incomplete=true publishes one without them"
        )
    reports = "report.json, vocabulary.json"
    lines.append(f"output: {summary.output} ({reports}), in {duration(summary.seconds)}")
    return "\n".join(lines)


def collection_summary(result: dict[str, Any], url: str) -> str:
    """A freshly published collection in a few lines; `result` is of `reduce_collection`."""
    with ReferenceCollection.open(url) as collection:
        counts = collection.manifest.counts
    line = f"collection: {url}, {counts_text(counts)}"
    grown = 0 < result["added"] < counts["references"]
    return f"{line}; {result['added']} added" if grown else line


def plan(folders: Folders) -> str:
    """What a build would still do. Writes nothing."""
    lines = []
    shards = folders.captions.complete()
    if shards is None:
        done = len(folders.captions.committed())
        lines.append(f"captions: corpus to be read, {done} shards there already")
    else:
        lines.append(f"captions: done, {len(shards)} shards")
    steps = (folders.prompts, folders.selected, folders.images, folders.references)
    for step in filter(None, steps):
        done = len(step.committed())
        missing = "all shards missing" if not done else f"{done} shards there"
        if shards is not None:
            missing = f"{len(shards) - done} of {len(shards)} shards missing"
        lines.append(f"{step.name}: {missing} ({step.store.url})")
    return "\n".join(lines)


def place(url: str) -> str:
    """What lies at a URL: the output of a build, one of its steps, or a collection.

    Raises:
        InputError: none of these.
    """
    store = Store.open(url)
    if store.exists(fmt.MANIFEST):
        return _collection(url)
    if store.exists(STEP):
        parent, _, name = store.url.rpartition("/")
        return _step(existing_step(Store.open(parent or "."), name))
    found = [name for name in STEPS if store.exists(f"{name}/{STEP}")]
    if not found:
        raise InputError(
            f"{url} is no output of `ovref build`, no step of one and no reference collection: "
            f"it has neither build steps, nor {STEP}, nor {fmt.MANIFEST}"
        )
    blocks = [_step(existing_step(store, name)) for name in found]
    if config := build_config(store):
        if config.get("images_from"):
            blocks.insert(0, f"images come from {config['images_from']}")
        collection = config.get("collection") or f"{store.url}/collection"
        if Store.open(collection).exists(fmt.MANIFEST):
            blocks.append(_collection(collection))
        else:
            blocks.append(f"collection: none yet at {collection}")
    return "\n".join(blocks)


def draw_samples(url: str, path: str) -> None:
    """A PNG of some images of a build, with the heatmaps and masks of their nouns.

    Raises:
        InputError: `url` is no output of a build, or there are no images yet.
    """
    from ovref.evaluation.pictures import generation_grid

    store = Store.open(url)
    store = Store.open(build_config(store).get("images_from") or url)
    if not store.exists(f"images/{STEP}"):
        raise InputError(f"there are no images at {store.url}: give the output of a build")
    step = existing_step(store, "images")
    records: list[ImageRecord] = []
    for shard in step.committed():
        for record in step.read(shard):
            if len(records) < SAMPLES:
                records.append(record)
        if len(records) == SAMPLES:
            break
    if not records:
        raise InputError(f"no images are finished in {step.store.url}; build some first")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    generation_grid(records, path)


def _step(step: StepFolder) -> str:
    state = "not complete" if step.complete() is None else "complete"
    quarantined = [Path(name).stem for name in step.store.list(QUARANTINE)]
    summary = summarise(step, 0)
    parts = [f"{step.name}: {summary.committed} shards, {state}"]
    if summary.inputs:
        parts.append(f"{summary.inputs} records in, {summary.outputs} out")
    for what, counts in (("dropped", summary.dropped), ("parts dropped", summary.dropped_parts)):
        if counts:
            parts.append(f"{what} {counts_text(counts)}")
    if summary.work_seconds:
        parts.append(f"{duration(summary.work_seconds)} of work")
    if quarantined:
        parts.append(f"quarantined {', '.join(quarantined)}")
    return "; ".join(parts)


def _collection(url: str) -> str:
    with ReferenceCollection.open(url) as collection:
        manifest = collection.manifest
        names = collection.nouns
        most = sorted(
            ((len(collection.references_of(name)), name) for name in names), reverse=True
        )[:NOUNS]
    return "\n".join(
        [
            f"collection: {url}, {counts_text(manifest.counts)}",
            f"  visual: {manifest.visual.model}, {manifest.visual.dim} wide, "
            f"index {manifest.visual_index.factory}",
            f"  textual: {manifest.textual.model}, {manifest.textual.dim} wide, "
            f"index {manifest.textual_index.factory}",
            "  most frequent nouns: " + ", ".join(f"{name} ({count})" for count, name in most),
            f"  fingerprint: {manifest.fingerprint}",
        ]
    )
