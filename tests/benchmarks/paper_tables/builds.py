"""The builds that the papers' tables need."""

from collections.abc import Callable, Sequence

from ovref.config import load
from ovref_inference.collection import format as fmt
from ovref_pipelines import recipe
from paper_tables.spec import BuildFirst


def build_missing(builds: Sequence[BuildFirst], say: Callable[[str], None]) -> int:
    """Builds, one after the other, the collections that are not there.

    A collection that is there is used as it is, even if the models behind it have changed since:
    delete it, or its build's output, to have it made again.

    Returns:
        Shards that failed permanently, over all builds; after a build with any, no other is begun.

    Raises:
        OvrefError, CollectionError, JobError, StoppedError: of a build, see `recipe.build`.
    """
    # Read first, so that a mistake in the last is reported before the first has run.
    configs = [load(recipe.BuildConfig, first.config, first.overrides) for first in builds]
    for config in configs:
        store = recipe.output_of(config).collection
        if store.exists(fmt.MANIFEST):
            continue
        say(f"ovref: building {store.url}")
        failed = recipe.build(config, say).quarantined
        if failed:
            return failed
    return 0
