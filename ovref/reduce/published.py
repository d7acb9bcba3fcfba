"""What is published where a collection is to be: is it that one already, may it be replaced?"""

from dataclasses import dataclass
from typing import Any

from ovref.errors import MismatchError
from ovref.identity import spec_identity
from ovref.reduce.spec import ReduceSpec
from ovref.storage.file_store import Store
from ovref_inference.collection import format as fmt
from ovref_inference.errors import CollectionError

PARTITIONS, SCATTER = "partitions", "_scatter"
"""Folders beside the manifest of a partitioned collection: what it consists of, and what an
unfinished reduction has made so far."""


@dataclass(frozen=True)
class Published:
    """The collection at a place."""

    manifest: fmt.AnyManifest
    partitions: tuple[fmt.Manifest, ...] = ()
    """The manifests of its partitions; empty if it is not partitioned."""

    @property
    def tombstones(self) -> int:
        return sum(one.counts["tombstones"] for one in self._parts)

    @property
    def settled(self) -> bool:
        """Whether its prototypes exclude all deleted references."""
        return all(one.settled_tombstones == one.counts["tombstones"] for one in self._parts)

    @property
    def _parts(self) -> tuple[fmt.Manifest, ...]:
        return (self.manifest,) if isinstance(self.manifest, fmt.Manifest) else self.partitions

    def summary(self, **more: Any) -> dict[str, Any]:
        """The summary of the reduction that made it."""
        return self.manifest.build["summary"] | {"fingerprint": self.manifest.fingerprint} | more


def read_published(place: Store, *, replace: bool = False) -> Published | None:
    """The collection at `place`; None if there is none.

    Args:
        replace: whether it will be replaced, so that one that cannot be read counts as none.

    Raises:
        CollectionError: it cannot be read.
    """
    if not place.exists(fmt.MANIFEST):
        return None
    try:
        manifest = fmt.parse_manifest(place.read(fmt.MANIFEST), f"{place.url}/{fmt.MANIFEST}")
        if isinstance(manifest, fmt.Manifest):
            return Published(manifest)
        contents = place.read_many([f"{one.path}/{fmt.MANIFEST}" for one in manifest.partitions])
        parts = [
            fmt.checked_partition(fmt.parse_manifest(content, f"{place.url}/{path}"), info, where)
            for info, where, (path, content) in zip(
                manifest.partitions, manifest.places(place.url), contents.items(), strict=True
            )
        ]
        return Published(manifest, tuple(parts))
    except CollectionError:
        if replace:
            return None
        raise


def already_published(
    output: Store,
    wanted: str,
    base: fmt.Heading | None,
    spec: ReduceSpec,
    *,
    nothing_new: bool,
    replace: bool,
) -> Published | None:
    """The published collection if it is the requested one; None otherwise.

    Args:
        wanted: the fingerprint of the requested one.
        base: the manifest of the collection that is grown.
        nothing_new: whether no shards are added to it.

    Raises:
        MismatchError: it is another collection and must not be replaced, or replacing it would
            bring deleted references back.
    """
    published = read_published(output, replace=replace)
    if published is None or published.manifest.fingerprint == wanted:
        return published
    if base is not None and published.manifest.fingerprint == base.fingerprint:
        if nothing_new and published.settled and base.build.get("reduce") == spec_identity(spec):
            return published
        return None
    partitioned = isinstance(published.manifest, fmt.PartitionedManifest)
    if not replace and partitioned != (spec.partition_references is not None):
        raise MismatchError(
            f"{output.url} holds {_kind(partitioned)}, this one would be {_kind(not partitioned)} "
            f"(reduce.partition_references={spec.partition_references}): choose another folder, "
            "set replace=true to make it anew, or set reduce.partition_references as it was"
        )
    if not replace:
        raise MismatchError(
            f"{output.url} holds another collection (fingerprint "
            f"{published.manifest.fingerprint[:12]}, this one has {wanted[:12]}); choose another "
            "folder, or set replace=true"
        )
    if deleted := published.tombstones:
        raise MismatchError(
            f"{output.url} has {deleted} deleted references, which a new collection would contain "
            f"again: choose another folder, or keep them deleted with base={output.url}"
        )
    return None


def check_kind_of_base(base: Published, url: str, spec: ReduceSpec) -> None:
    """Raises MismatchError if a collection is partitioned and should not be, or the reverse."""
    wanted = spec.partition_references
    if isinstance(base.manifest, fmt.Manifest):
        if wanted is not None:
            raise MismatchError(
                f"{url} is {_kind(False)}, which growing does not divide: leave out "
                f"reduce.partition_references, or divide it first by `ovref convert collection "
                f"{url} NEW --partition-references {wanted}` and grow NEW"
            )
        return
    made = base.manifest.build["reduce"]["fields"]["partition_references"]
    if wanted != made:
        raise MismatchError(
            f"{url} is {_kind(True)}, which growing does not divide anew: set "
            f"reduce.partition_references={made} as it was made with, found {wanted}; or reduce "
            "all its shards anew into another folder, without base"
        )


def remove_leftovers(output: Store) -> None:
    """Removes what reductions have left beside the partitioned collection at `output`: scattered
    references, and partitions that it does not name."""
    manifest = fmt.parse_manifest(output.read(fmt.MANIFEST), output.url)
    parts = manifest.partitions if isinstance(manifest, fmt.PartitionedManifest) else ()
    named = {one.path for one in parts}
    if output.list(SCATTER):
        output.delete_folder(SCATTER)
    there = {"/".join(path.split("/")[:2]) for path in output.list(PARTITIONS)}
    for folder in sorted(there - named):
        output.delete_folder(folder)


def _kind(partitioned: bool) -> str:
    return "a partitioned collection" if partitioned else "one undivided collection"
