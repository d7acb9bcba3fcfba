"""The published collection that is being grown, and what the new one reuses of it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ovref.errors import MismatchError
from ovref.identity import canonical, spec_identity
from ovref.locations import with_absolute_models
from ovref.reduce.indexing import ROLES, GrownIndex
from ovref.reduce.noun_prototypes import GrownPrototypes
from ovref.reduce.spec import ReduceSpec
from ovref.stages.embed import Embed
from ovref.storage.file_store import Store
from ovref_inference.collection import format as fmt
from ovref_inference.collection import store as collections


@dataclass(frozen=True)
class Base:
    """The published collection that is being grown."""

    manifest: fmt.Manifest
    paths: dict[str, Path]
    """Role -> local file."""

    @property
    def rows(self) -> int:
        return self.manifest.counts["references"]


def open_base(store: Store, embed: Embed, cache: Path | None = None) -> Base:
    """Fetches the collection at `store` to this machine.

    Args:
        cache: folder for the copy of a remote one; None takes the user's.

    Raises:
        MismatchError: its encoders, templates or weights differ from those of `embed`.
        CollectionError: it cannot be read.
    """
    manifest, paths = collections.fetch(
        store.url, cache=cache, storage_options=store.storage_options
    )
    check_same_encoders(store.url, manifest, embed)
    return Base(manifest, paths)


def check_same_encoders(url: str, manifest: fmt.Heading, embed: Embed) -> None:
    """Raises MismatchError unless `embed` makes references for the collection at `url`."""
    placed, visual, textual = with_absolute_models(embed), manifest.visual, manifest.textual
    if visual.settings != canonical(embed.visual):  # as of a manifest with relative paths
        embed = replace(embed, visual=placed.visual)
    if textual.settings != canonical(embed.text):
        embed = replace(embed, text=placed.text)
    parts = {
        "visual encoder": (canonical(embed.visual), visual.settings),
        "text encoder": (canonical(embed.text), textual.settings),
        "templates": (list(embed.templates), list(manifest.templates)),
        "weights": (list(embed.weights), list(manifest.weights)),
        "part": (embed.part, manifest.build["embed"]["fields"].get("part", "region")),
    }
    for name, (new, old) in parts.items():
        if new != old:
            raise MismatchError(
                f"{url} cannot be grown with these references: its {name} is {old}, theirs "
                f"is {new}; embeddings of different encoders cannot be compared, so build another "
                "collection"
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


def provenance_of(base: fmt.Heading | None, new: dict[str, Any]) -> list[dict[str, Any]]:
    """The provenance of the base's references, then that of the new ones.

    A base without provenance counts as one entry with its fingerprint.
    """
    if base is None:
        return [new]
    unsaid = [{"unknown": base.fingerprint}]
    before = base.build.get("provenance") or unsaid
    return before if new in before else [*before, new]
