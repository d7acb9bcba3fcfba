"""Shows a build to people: a plan before it, a summary after it, pictures."""

from pathlib import Path
from typing import Any

from ovref.errors import InputError
from ovref_inference import ReferenceCollection
from ovref_pipelines.engine.ledger import CRASHED, CRASHED_WORKER, QUARANTINE
from ovref_pipelines.engine.progress import duration
from ovref_pipelines.engine.summary import counts_text, step_line
from ovref_pipelines.folders import Folders
from ovref_pipelines.output import open_build
from ovref_pipelines.recipe import BuildSummary

SAMPLES = 6
"""Images in a picture of samples."""


def build_summary(summary: BuildSummary) -> str:
    """Results and failures of a build."""
    lines = [f"captions: {summary.ingested.captions} in {summary.ingested.shards} shards"]
    if summary.ingested.dropped:
        lines[0] += f"; dropped {counts_text(summary.ingested.dropped)}"
    lines += [step_line(step) for step in summary.steps]
    if summary.collection is not None:
        lines.append(collection_summary(summary.collection, summary.collection_url))
    for step in summary.steps:
        if crashed := step.dropped.get(CRASHED_WORKER):
            lines.append(
                f"{crashed} records of {step.step} killed their workers and were excluded; the "
                f"reasons are in {step.output}/{CRASHED}. When the cause is fixed, "
                "`ovref build --retry-failed` makes them again"
            )
        if step.quarantined:
            lines.append(
                f"FAILED: {len(step.quarantined)} shards of {step.step}; tracebacks are in "
                f"{step.output}/{QUARANTINE}. The same command retries them"
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
    """A freshly published collection in a few lines; `result` is from `reduce_collection`."""
    with ReferenceCollection.open(url) as collection:
        counts = collection.manifest.counts
    line = f"collection: {url}, {counts_text(counts)}"
    grown = 0 < result["added"] < counts["references"]
    return f"{line}; {result['added']} added" if grown else line


def plan(folders: Folders) -> str:
    """Remaining work of a build. Writes nothing."""
    lines = []
    shards = folders.captions.complete()
    if shards is None:
        done = len(folders.captions.committed())
        lines.append(f"captions: corpus not read yet, {done} shards committed")
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


def draw_samples(url: str, path: str) -> None:
    """Writes a PNG of some images of a build, with the heatmaps and masks of their nouns.

    Raises:
        InputError: `url` is not the output of a build, or there are no images yet.
    """
    from ovref.evaluation.picture_grids import generation_grid

    build = open_build(url)
    if not build.has("images"):
        raise InputError(f"there are no images at {build.upstream.url}: build some first")
    step = build.step("images")
    records: list[Any] = []
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
