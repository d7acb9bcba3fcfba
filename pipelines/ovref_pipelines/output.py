"""What the output of a build looks like: its files, its steps, and where its collection is."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovref.errors import InputError, StorageError
from ovref.storage.steps import STEP, StepFolder
from ovref.storage.store import Store
from ovref_inference.collection import format as fmt
from ovref_pipelines.engine.ledger import QUARANTINE

BUILD = "build.json"
"""The configuration of a build, in its output."""
STEPS = ("captions", "prompts", "selected", "images", "references")
REPORT, COLLECTION, WORK = "report.json", "collection", "_reduce"
REPORTS = "reports"
"""Folder of one report a step."""
VOCABULARY = "vocabulary.json"
SELECTED = f"selected/{STEP}"
"""Tells that a build has this step, which most do not have."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """The output of a build, as far as it has come."""

    store: Store
    places: dict[str, Store]
    """Where each of its steps is, or will be, in their order; in another build's output for
    `images_from`."""
    collection: str
    """URL of its collection, published or not."""

    def has(self, name: str) -> bool:
        return self.places[name].exists(f"{name}/{STEP}")

    def is_own(self, name: str) -> bool:
        """Whether the step is in this output, not in that of another build."""
        return self.places[name] == self.store


def build_config(store: Store) -> dict[str, Any]:
    """The configuration of the build whose output this is; empty if there is none.

    Raises:
        StorageError: its build.json is damaged.
    """
    if not store.exists(BUILD):
        return {}
    try:
        return dict(json.loads(store.read(BUILD)))
    except (ValueError, TypeError) as error:
        raise StorageError(f"{store.url}/{BUILD} is damaged: {error}") from error


def open_build(url: str) -> Build:
    """The build whose output is `url`.

    Raises:
        InputError: there is none.
        StorageError: its build.json is damaged.
    """
    store = Store.open(url)
    config = build_config(store)
    if not config and not any(store.exists(f"{name}/{STEP}") for name in STEPS):
        raise InputError(
            f"{url} is no output of `ovref build`: it has neither {BUILD} nor any of the steps "
            f"{', '.join(STEPS)}"
        )
    upstream = Store.open(config["images_from"]) if config.get("images_from") else store
    selects = config["select_prompts"] if "select_prompts" in config else store.exists(SELECTED)
    steps = [name for name in STEPS if name != "selected" or selects]
    return Build(
        store=store,
        places={name: store if name == "references" else upstream for name in steps},
        collection=config.get("collection") or store.child(COLLECTION).url,
    )


def quarantined_in(step: StepFolder) -> list[str]:
    """Shards that failed for good and were not made since."""
    names = (Path(path).name.removesuffix(".json") for path in step.store.list(QUARANTINE))
    return sorted(set(names) - set(step.committed()))


def is_published(build: Build) -> bool:
    """Whether the build has a collection, of whatever age."""
    return Store.open(build.collection).exists(fmt.MANIFEST)
