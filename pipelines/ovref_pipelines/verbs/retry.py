"""Retries permanent failures, once their cause is fixed.

Every build retries shards in quarantine. A record that was excluded because it kills its worker is
not retried, because its shard is committed. Here such shards are withdrawn, with everything made
from them, so that the next build makes them completely.

Another build that uses these images (`images_from`) is not changed; run the same on that build to
find what it made from the earlier shards.
"""

from dataclasses import dataclass

from ovref.errors import ConfigError
from ovref.storage.steps import StepFolder
from ovref_pipelines.build_config import BuildConfig, output_of
from ovref_pipelines.engine.ledger import CRASHED_WORKER
from ovref_pipelines.folders import Folders
from ovref_pipelines.output import quarantined_in


@dataclass(frozen=True, kw_only=True)
class Failed:
    """Permanent failures in one step."""

    step: str
    quarantined: tuple[str, ...]
    """Shards that are not committed; the next build retries them in any case."""
    crashed: dict[str, int]
    """Shard -> its records that were dropped because they kill their worker."""
    outdated: tuple[str, ...]
    """Shards made from ones that another build has since replaced."""
    kept_because: str | None
    """Why the shards of `crashed` cannot be withdrawn; None if they can."""


def failed_in(config: BuildConfig, folders: Folders) -> list[Failed]:
    """Permanent failures in each step of a build, from its markers."""
    found, output = [], output_of(config)
    given = folders.captions.commits()
    for step in _steps(folders):
        commits, own = step.commits(), output.is_own(step.name)
        crashed = {
            shard: commit.dropped[CRASHED_WORKER]
            for shard, commit in commits.items()
            if CRASHED_WORKER in commit.dropped
        }
        # What is selected from a shard depends on the shards before it, so it is never retried.
        retried = own and step is not folders.selected
        outdated = tuple(
            shard
            for shard, commit in commits.items()
            if retried and shard in given and commit.inputs != given[shard].outputs
        )
        given = commits
        kept = None
        if not own:
            kept = (
                "the step belongs to another build; run `ovref build --retry-failed` for "
                f"{step.store.url}"
            )
        elif step is folders.prompts and folders.selected is not None:
            kept = "prompts are selected from all of them, so every image would change"
        found.append(
            Failed(
                step=step.name,
                quarantined=tuple(quarantined_in(step)),
                crashed=crashed,
                outdated=outdated,
                kept_because=kept if crashed else None,
            )
        )
    return found


def take_back(config: BuildConfig, folders: Folders, failed: list[Failed]) -> int:
    """Withdraws shards with crashed records, outdated ones and those made from them. Returns how
    many.

    Only while no build of this output runs. The published collection stays until the next build
    replaces it.

    Raises:
        ConfigError: a collection is published, which would change, and `replace` is not set.
    """
    to_free = {
        one.step: sorted({*one.outdated, *(() if one.kept_because else one.crashed)})
        for one in failed
    }
    if not any(to_free.values()):
        return 0
    output = output_of(config)
    if not config.replace and output.is_published:
        raise ConfigError(
            f"the collection at {output.collection.url} will change when failed shards are made "
            "again: give replace=true to allow it"
        )
    steps = _steps(folders)
    for first, step in enumerate(steps):
        # The last step first, so that an interruption leaves no shard whose source was withdrawn.
        for later in reversed(steps[first:]):
            later.take_back(to_free[step.name])
    return len({shard for shards in to_free.values() for shard in shards})


def failed_text(failed: list[Failed]) -> str:
    """`failed_in` for people."""
    lines = []
    for one in failed:
        if one.quarantined:
            lines.append(f"{one.step}: {len(one.quarantined)} quarantined shards, retried")
        if one.crashed:
            what = f"{sum(one.crashed.values())} records of {len(one.crashed)} shards"
            then = f"stay dropped: {one.kept_because}" if one.kept_because else "made again"
            lines.append(f"{one.step}: {what} killed their workers, {then}")
        if one.outdated:
            what = "were made of shards that another build has made again since"
            lines.append(f"{one.step}: {len(one.outdated)} shards {what}; they are made again too")
    return "\n".join(lines) or "nothing has failed permanently"


def _steps(folders: Folders) -> list[StepFolder]:
    steps = [folders.prompts, folders.selected, folders.images, folders.references]
    return [step for step in steps if step is not None]
