"""Summary of a step's folder after a run, from its markers."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ovref.storage.steps import StepFolder
from ovref_pipelines.engine.progress import duration

NAMED_LOST = 8
"""Maximum number of nouns in a warning about those whose references were all dropped."""


@dataclass(frozen=True, kw_only=True)
class StepSummary:
    """Content of a step's folder after a run."""

    step: str
    output: str
    """URL of the step's folder."""
    shards: int
    """Number of shards of its source."""
    committed: int
    committed_now: int
    """Shards committed by this run."""
    inputs: int
    """Records, over all committed shards, like the counts below."""
    outputs: int
    dropped: dict[str, int]
    """Whole records dropped, by reason."""
    dropped_parts: dict[str, int]
    """Regions dropped, by reason."""
    quarantined: tuple[str, ...]
    """Shards that failed permanently in this run."""
    trouble: dict[str, int]
    """In this run: `errors` of stages, `worker_deaths`, `node_losses`, `crashed_records`."""
    seconds: float
    """Wall clock of this run."""
    work_seconds: float
    """Time spent on shards by all workers of all runs."""


def summarise(
    target: StepFolder,
    shards: int,
    *,
    committed_now: int = 0,
    quarantined: tuple[str, ...] = (),
    trouble: dict[str, int] | None = None,
    seconds: float = 0.0,
) -> StepSummary:
    """Adds up the markers of a step whose source has `shards`."""
    commits = list(target.commits().values())
    dropped: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    for commit in commits:
        dropped.update(commit.dropped)
        parts.update(commit.dropped_parts)
    return StepSummary(
        step=target.name,
        output=target.store.url,
        shards=shards,
        committed=len(commits),
        committed_now=committed_now,
        inputs=sum(commit.inputs for commit in commits),
        outputs=sum(commit.outputs for commit in commits),
        dropped=dict(sorted(dropped.items())),
        dropped_parts=dict(sorted(parts.items())),
        quarantined=quarantined,
        trouble=trouble or {},
        seconds=round(seconds, 3),
        work_seconds=round(sum(commit.seconds for commit in commits), 3),
    )


def step_line(step: StepSummary) -> str:
    """A step in one line."""
    now = f" ({step.committed_now} now, in {duration(step.seconds)})" if step.committed_now else ""
    parts = [
        f"{step.step}: {step.committed}/{step.shards} shards{now}, "
        f"{step.inputs} records in, {step.outputs} out"
    ]
    for what, counts in (("dropped", step.dropped), ("parts dropped", step.dropped_parts)):
        if counts:
            parts.append(f"{what} {counts_text(counts)}")
    if step.quarantined:
        parts.append(f"quarantined {', '.join(step.quarantined)}")
    return "; ".join(parts)


def filter_warnings(summary: dict[str, Any]) -> list[str]:
    """What to know about the filters of a collection, from the summary of its reduction."""
    lines = []
    if lost := summary.get("lost_nouns"):
        named = ", ".join(f"{noun} ({count})" for noun, count in lost["most_frequent"][:NAMED_LOST])
        more = ", ..." if lost["nouns"] > NAMED_LOST else ""
        lines.append(
            f"the filters dropped all references of {lost['nouns']} "
            f"{'noun' if lost['nouns'] == 1 else 'nouns'}: {named}{more}; relax reduce.filter, or "
            "see what it dropped in `ovref explore`"
        )
    if flagged := summary.get("flagged", {}).get("unsafe"):
        lines.append(
            f"{flagged} references are of images that were classified as unsafe; "
            "reduce.filter.max_unsafe drops them"
        )
    return lines


def counts_text(counts: dict[str, int]) -> str:
    """Counts by reason, for people: `3 no_noun, 1 too_long`."""
    return ", ".join(f"{count} {what}" for what, count in counts.items())
