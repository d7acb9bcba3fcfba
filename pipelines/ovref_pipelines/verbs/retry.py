"""Making again what failed for good, once its cause is mended.

A shard in quarantine is tried again by every build. A record that was left out of its shard because
it kills its worker is not: its shard is committed. Here such shards are taken back, with all that
was made of them, so that the next build makes them whole.

Another build that uses these images (`images_from`) does not hear of it; what it has made of such
shards as they were is found here too, when the same is asked of that build.
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
    """What failed for good in one step."""

    step: str
    quarantined: tuple[str, ...]
    """Shards that are not committed; the next build tries them in any case."""
    crashed: dict[str, int]
    """Shard -> its records that were dropped because they kill their worker."""
    outdated: tuple[str, ...]
    """Shards made of ones that another build has made again since."""
    kept_because: str | None
    """Why the shards of `crashed` cannot be taken back; None if they can."""


def failed_in(config: BuildConfig, folders: Folders) -> list[Failed]:
    """What failed for good in each step of a build, from its markers."""
    found, output = [], output_of(config)
    given = folders.captions.commits()
    for step in _steps(folders):
        commits, own = step.commits(), output.is_own(step.name)
        crashed = {
            shard: commit.dropped[CRASHED_WORKER]
            for shard, commit in commits.items()
            if CRASHED_WORKER in commit.dropped
        }
        outdated = tuple(
            shard
            for shard, commit in commits.items()
            if own and shard in given and commit.inputs != given[shard].outputs
        )
        given = commits
        kept = None
        if not own:
            kept = (
                f"the step belongs to another build; run `ovref retry-failed` for {step.store.url}"
            )
        elif step is folders.prompts and folders.selected is not None:
            kept = "prompts are selected from all of them, so every image would be another"
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
    """Takes back shards with crashed records, outdated ones and what was made of them; how many.

    Only while no build of this output runs. What was published stays as it is until it is
    replaced by the next build.

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
            f"the collection at {output.collection.url} will change when what failed is made "
            "again: give replace=true to allow it"
        )
    steps = _steps(folders)
    for first, step in enumerate(steps):
        # The last step first: whatever happens, nothing is left that was made of something else.
        for later in reversed(steps[first:]):
            later.take_back(to_free[step.name])
    return len({shard for shards in to_free.values() for shard in shards})


def failed_text(failed: list[Failed]) -> str:
    """`failed_in` for people."""
    lines = []
    for one in failed:
        if one.quarantined:
            lines.append(f"{one.step}: {len(one.quarantined)} shards in quarantine, tried again")
        if one.crashed:
            what = f"{sum(one.crashed.values())} records of {len(one.crashed)} shards"
            then = f"stay dropped: {one.kept_because}" if one.kept_because else "made again"
            lines.append(f"{one.step}: {what} killed their workers, {then}")
        if one.outdated:
            what = "were made of shards that another build has made again since"
            lines.append(f"{one.step}: {len(one.outdated)} shards {what}; they are made again too")
    return "\n".join(lines) or "nothing has failed for good"


def _steps(folders: Folders) -> list[StepFolder]:
    steps = [folders.prompts, folders.selected, folders.images, folders.references]
    return [step for step in steps if step is not None]
