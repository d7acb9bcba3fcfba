"""Layout of a build's output: its files, its steps, and the place of its collection.

    build.json              the configuration, with absolute places, and the working directory
    captions/ ... references/   the steps (`STEPS`); in another build's output for `images_from`
    collection/             the collection, unless `collection` names another place
    progress.json           the current state, rewritten while the build runs (`live`)
    report.json             the summary of the last run; reports/<step>.json one per step
    vocabulary.json         the nouns of the prompts
    _reduce/                work files of the reduction
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovref.errors import InputError, StorageError
from ovref.locations import is_relative
from ovref.reduce.published import SCATTER
from ovref.storage.file_store import Store
from ovref.storage.steps import STEP, StepFolder, existing_step
from ovref_inference.collection import format as fmt
from ovref_inference.collection import hub
from ovref_pipelines.engine.ledger import QUARANTINE

BUILD = "build.json"
FOLDER = "folder"
"""Key of build.json: the folder that relative paths of models start from."""
STEPS = ("captions", "prompts", "selected", "images", "references")
REPORT, COLLECTION, WORK = "report.json", "collection", "_reduce"
REPORTS = "reports"
VOCABULARY = "vocabulary.json"


@dataclass(frozen=True, kw_only=True)
class BuildOutput:
    """The output of a build, finished or not."""

    store: Store
    upstream: Store
    """Where the steps up to the images are: here, or in the output that `images_from` names."""
    collection: Store
    """Where the collection is, or will be."""
    selects: bool
    """Whether the build has the optional step that selects prompts."""

    @property
    def steps(self) -> tuple[str, ...]:
        """The names of its steps, in the order of the flow."""
        return tuple(name for name in STEPS if name != "selected" or self.selects)

    def place(self, name: str) -> Store:
        """The output that holds a step: this one, or another build's."""
        return self.store if name == "references" else self.upstream

    def is_own(self, name: str) -> bool:
        """Whether a step is in this output, not in another build's."""
        return self.place(name) == self.store

    def has(self, name: str) -> bool:
        """Whether a step has been started."""
        return self.place(name).exists(f"{name}/{STEP}")

    def step(self, name: str) -> StepFolder:
        """A step as it was written. Raises StorageError if it is missing or damaged."""
        return existing_step(self.place(name), name)

    @property
    def is_published(self) -> bool:
        """Whether the build has a collection, current or not."""
        return self.collection.exists(fmt.MANIFEST)


def layout(
    output: str, *, images_from: str | None, collection: str | None, selects: bool
) -> BuildOutput:
    """The layout of an output, from the settings that determine it."""
    store = Store.open(output)
    return BuildOutput(
        store=store,
        upstream=Store.open(images_from) if images_from else store,
        collection=Store.open(collection) if collection else store.child(COLLECTION),
        selects=selects,
    )


def is_collection(url: str) -> bool:
    """Whether there is a collection at the URL. On the Hub nothing else can be opened."""
    return url.startswith(hub.PREFIX) or Store.open(url).exists(fmt.MANIFEST)


def build_config(store: Store) -> dict[str, Any]:
    """The content of a build's build.json; empty if there is none.

    Raises:
        StorageError: it is damaged.
    """
    content = store.read_if_there(BUILD)
    if content is None:
        return {}
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError) as error:
        raise StorageError(f"{store.url}/{BUILD} is damaged: {error}") from error


def open_build(url: str) -> BuildOutput:
    """The build whose output is `url`.

    Raises:
        InputError: there is none, or its images are in another output that is not there.
        StorageError: its build.json is damaged.
    """
    store = Store.open(url)
    config = build_config(store)
    if not config and not any(store.exists(f"{name}/{STEP}") for name in STEPS):
        if store.list(SCATTER):
            raise InputError(
                f"{url} has an unfinished collection, in partitions: run the command that was "
                "making it again (`ovref convert collection`, `reduce` or `build`), and it goes on"
            )
        raise InputError(
            f"{url} is no output of `ovref build`: it has neither {BUILD} nor any of the steps "
            f"{', '.join(STEPS)}"
        )
    selects = config.get("select_prompts", store.exists(f"selected/{STEP}"))
    build = layout(
        url,
        images_from=config.get("images_from"),
        collection=config.get("collection"),
        selects=bool(selects),
    )
    if build.upstream != store and not build.has(STEPS[0]):
        relative = is_relative(config["images_from"])
        raise InputError(
            f"{store.url}/{BUILD} says images_from={config['images_from']}, but there is no build "
            + (
                "there: it was written by an older ovref, and that is relative to the folder in "
                "which the build was started. Run this command there, or the build once more"
                if relative
                else "there any more: was it moved or deleted?"
            )
        )
    return build


def quarantined_in(step: StepFolder) -> list[str]:
    """Shards that failed permanently and have not been made since."""
    names = (Path(path).name.removesuffix(".json") for path in step.store.list(QUARANTINE))
    return sorted(set(names) - set(step.committed()))
