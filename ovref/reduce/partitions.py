"""One partition of a collection: the task that makes it, and what became of all of them."""

import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ovref.errors import StorageError
from ovref.reduce.filter import DROPPED, NothingKeptError, join_lost_nouns
from ovref.reduce.made_from import MadeFrom
from ovref.reduce.noun_prototypes import SHOWN, NoTexts
from ovref.reduce.phases import one_at_a_time
from ovref.reduce.published import PARTITIONS, read_published
from ovref.reduce.run import reduce_undivided
from ovref.reduce.scatter import PartitionReferences, planned_embeddings
from ovref.reduce.spec import ReduceSpec
from ovref.storage.file_store import Store
from ovref.storage.scratch import scratch_folder
from ovref.storage.steps import StepFolder
from ovref_inference.collection import format as fmt
from ovref_inference.places import sha256_of


@dataclass(frozen=True)
class Part:
    """What became of the references of a leaf."""

    path: str
    """Folder of the partition, in the collection."""
    manifest: fmt.Manifest | None
    """None if the filters left none of them."""
    filtered: list[dict[str, Any]]
    """Counts before and after each filter; empty if it was not made again."""
    lost_nouns: dict[str, Any] = field(default_factory=dict)
    """If the filters left none of them; as in the summary."""


def reduce_leaf(
    references: PartitionReferences,
    plan: StepFolder,
    spec: ReduceSpec,
    made_from: MadeFrom,
    output: Store,
    name: str,
    base: Store | None,
    work: Path,
) -> Part:
    """A task: makes one partition, in a folder of its own below `work`."""
    path = f"{PARTITIONS}/{name}"
    place, folder = output.child(path), work / name
    # Its name holds the fingerprint of the whole: if it is there, it is the right one.
    with one_at_a_time(folder.with_suffix(".lock"), lambda *_: None):
        if (made := read_published(place)) is None:
            try:
                with scratch_folder() as cache:
                    reduce_undivided(
                        [references],
                        spec,
                        made_from=made_from,
                        texts=NoTexts(),
                        embeddings=planned_embeddings(plan, references.leaf),
                        output=place,
                        work=folder,
                        base=base,
                        cache=Path(cache),
                    )
            except NothingKeptError as error:
                shutil.rmtree(folder)
                return Part(path, None, error.steps, error.lost_nouns)
            made = read_published(place)
        if not references.passed_filters:
            for dropped in folder.glob(f"*-{DROPPED}"):
                dropped.replace(work / f"{name}-{DROPPED}")
        shutil.rmtree(folder, ignore_errors=True)
    if made is None or not isinstance(made.manifest, fmt.Manifest):
        raise StorageError(f"{place.url} was removed while it was made; run the same command again")
    return Part(path, made.manifest, made.manifest.build["summary"]["filter"])


def copy_partition(source: Store, output: Store, path: str) -> Part:
    """A task: copies a partition as it is, its manifest last."""
    target, content = output.child(path), source.read(fmt.MANIFEST)
    manifest = fmt.undivided(fmt.parse_manifest(content, source.url), source.url)
    if not target.exists(fmt.MANIFEST) or target.read(fmt.MANIFEST) != content:
        for info in manifest.files.values():
            with source.local_copy(info.path) as local:
                if sha256_of(local) != info.sha256:
                    raise StorageError(f"{source.url}/{info.path} is damaged; `ovref verify` it")
                target.upload(local, info.path)
        target.write(fmt.MANIFEST, content)
    return Part(path, manifest, [])


def summary_of(parts: list[Part], before: int) -> dict[str, Any]:
    """What `collection.reduce_collection` returns, from the summaries of the partitions.

    Args:
        before: references of the collection that was grown.
    """
    there = [part.manifest for part in parts if part.manifest]
    every = [manifest.build["summary"] for manifest in there]
    again = [one.manifest.build["summary"] for one in parts if one.filtered and one.manifest]
    references = sum(manifest.counts["references"] for manifest in there)
    flagged = [one["flagged"] for one in every if "flagged" in one]
    lost = [one["lost_nouns"] for one in again if "lost_nouns" in one]
    lost += [part.lost_nouns for part in parts if part.lost_nouns]
    nouns = [tuple(pair) for one in every for pair in one["most_frequent"] + one["least_frequent"]]
    ranked = [[noun, count] for noun, count in sorted(set(nouns))]
    return {
        "references": references,
        "added": references - before,
        "filter": filtered(parts),
        "noun_agreement": _agreement(again),
        **({"flagged": {"unsafe": sum(one["unsafe"] for one in flagged)}} if flagged else {}),
        **({"lost_nouns": join_lost_nouns(lost)} if lost else {}),
        "partitions": len(there),
        "partitions_made": len(again),
        "largest_partition": max(manifest.counts["references"] for manifest in there),
        **{name: sum(one[name] for one in every) for name in ("nouns", "rare_nouns", "prototypes")},
        "nouns_clustered": sum(one["nouns_clustered"] for one in again),
        "most_frequent": sorted(ranked, key=lambda pair: -pair[1])[:SHOWN],
        "least_frequent": sorted(ranked, key=lambda pair: pair[1])[:SHOWN],
    }


def filtered(parts: Iterable[Part]) -> list[dict[str, Any]]:
    """Counts before and after each filter, over all partitions."""
    totals: dict[str, Counter[str]] = {}
    for step in (step for part in parts for step in part.filtered):
        totals.setdefault(step["filter"], Counter()).update(
            before=step["before"], after=step["after"]
        )
    return [{"filter": name} | counts for name, counts in totals.items()]


def _agreement(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """The noun agreement over partitions: means weighted by the references that were judged."""
    found = [(one["noun_agreement"], one["filter"][-1]) for one in summaries]
    judged = [(one, one["judged"] - step["before"] + step["after"]) for one, step in found if one]
    if not judged:
        return {}

    def mean(name: str, weights: list[int]) -> float | None:
        if not sum(weights):
            return None
        values = [one[name] or 0.0 for one, _ in judged]
        return round(float(np.average(values, weights=weights)), 6)

    return {
        "judged": sum(one["judged"] for one, _ in judged),
        "mean_before": mean("mean_before", [one["judged"] for one, _ in judged]),
        "mean_of_kept": mean("mean_of_kept", [kept for _, kept in judged]),
    }
