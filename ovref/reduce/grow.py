"""The published collection that is being grown, and what the new one reuses of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovref.errors import MismatchError
from ovref.identity import spec_identity
from ovref.reduce.indexing import ROLES, GrownIndex
from ovref.reduce.made_from import MadeFrom
from ovref.reduce.noun_prototypes import GrownPrototypes
from ovref.reduce.spec import ReduceSpec
from ovref.storage.file_store import Store
from ovref_inference.collection import format as fmt
from ovref_inference.collection import store as collections
from ovref_inference.errors import CollectionError


@dataclass(frozen=True)
class Base:
    """The published collection that is being grown."""

    manifest: fmt.Manifest
    paths: dict[str, Path]
    """Role -> local file."""

    @property
    def rows(self) -> int:
        return self.manifest.counts["references"]


def open_base(store: Store, made_from: MadeFrom, cache: Path | None = None) -> Base:
    """Fetches the collection at `store` to this machine.

    Args:
        made_from: what makes the new references.
        cache: folder for the copy of a remote one; None takes the user's.

    Raises:
        MismatchError: its encoders, templates or weights differ from those of `made_from`.
        CollectionError: it cannot be read, or does not say how it was made.
    """
    manifest, paths = collections.fetch(
        store.url, cache=cache, storage_options=store.storage_options
    )
    check_same_encoders(store.url, manifest, made_from)
    return Base(manifest, paths)


def check_same_encoders(url: str, manifest: fmt.Heading, made_from: MadeFrom) -> None:
    """Raises MismatchError unless the collection at `url` was made in the same way, CollectionError
    if its manifest does not say how."""
    made = manifest.build.get("embed", {}).get("fields")
    if made is None:
        raise CollectionError(
            f"{url} cannot be grown: its manifest lacks `embed` in `build`, which says how its "
            "references were embedded; build another collection"
        )
    new = made_from.embed["fields"]
    # A manifest has relative paths of models as they were given, or made absolute.
    visual, text = (
        new[name] if old.settings == new[name] else placed.settings
        for name, old, placed in (
            ("visual", manifest.visual, made_from.visual),
            ("text", manifest.textual, made_from.textual),
        )
    )
    parts = {
        "visual encoder": (visual, manifest.visual.settings),
        "text encoder": (text, manifest.textual.settings),
        "templates": (list(made_from.templates), list(manifest.templates)),
        "weights": (list(made_from.weights), list(manifest.weights)),
        "part": (new.get("part", "region"), made.get("part", "region")),
    }
    for name, (theirs, its) in parts.items():
        if theirs != its:
            raise MismatchError(
                f"{url} cannot be grown with these references: its {name} is {its}, theirs "
                f"is {theirs}; embeddings of different encoders cannot be compared, so build "
                "another collection"
            )


def grown_indexes(grown: Base | None, spec: ReduceSpec) -> dict[str, GrownIndex]:
    """The base's indexes by role; empty if they were made with another seed or version, since the
    centroids would then differ from those of building at once."""
    if grown is None or not _same_setting(grown, spec, "seed"):
        return {}
    return {
        role: GrownIndex(
            path=grown.paths[f"{role}_index"],
            info=getattr(grown.manifest, f"{role}_index"),
            rows=grown.rows,
        )
        for role in ROLES
    }


def grown_prototypes(grown: Base | None, spec: ReduceSpec) -> GrownPrototypes | None:
    """What clustering reuses of the grown collection, if there is one."""
    if grown is None:
        return None
    tombstones = grown.paths["tombstones"]
    not_applied = fmt.read_tombstones(tombstones, skip=grown.manifest.settled_tombstones)
    return GrownPrototypes(
        nouns=grown.paths["nouns"],
        prototypes=grown.paths["prototypes"],
        references=grown.rows,
        excluded=np.setdiff1d(fmt.read_tombstones(tombstones), not_applied),
        same_settings=_same_setting(grown, spec, "prototypes"),
    )


def _same_setting(grown: Base, spec: ReduceSpec, field: str) -> bool:
    """Whether the base was reduced by the present version with the same value of a setting."""
    now, then = spec_identity(spec), grown.manifest.build.get("reduce", {})
    return then.get("version") == now["version"] and then["fields"][field] == now["fields"][field]


def inputs_of(grown: Base | None) -> list[dict[str, Any]]:
    """The base's input shards, as named in its manifest."""
    return grown.manifest.build["inputs"] if grown else []
