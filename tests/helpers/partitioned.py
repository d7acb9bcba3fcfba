"""Collections of the tests divided into partitions by noun."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np

from ovref_inference import ReferenceCollection
from ovref_inference.collection import format as fmt
from ovref_inference.collection import store


def part_of(built, nouns, number):
    """What went into the partition that has these nouns, as `Built` holds it."""
    rows = sorted(built.nouns.index(noun) for noun in nouns)
    kept = np.flatnonzero(np.isin(built.noun_of, rows))

    class Part(type(built)):
        def __init__(self):
            self.nouns = [built.nouns[row] for row in rows]
            self.counts, self.noun_embeddings = built.counts[rows], built.noun_embeddings[rows]
            self.config, self.kept = built.config, kept
            self.noun_of = np.searchsorted(rows, built.noun_of[kept])
            self.visual, self.textual = built.visual[kept], built.textual[kept]
            self.prototypes = self._prototypes()

        def references(self):
            columns = {name: [of[i] for i in kept] for name, of in built.references().items()}
            return columns | {"id": range(len(kept))}

        def manifest(self):
            return dataclasses.replace(super().manifest(), fingerprint=f"{number:064x}")

    return Part()


def publish_partitioned(whole, partitions, url, scratch, **storage):
    """Publishes the collection of partitions that are at `url` already.

    Args:
        whole: the manifest of the undivided collection; partitions: theirs.
    """
    tree = scratch / "partition_tree.npz"
    np.savez(tree, thresholds=np.arange(len(partitions)))
    infos = tuple(
        fmt.PartitionInfo(
            path=f"partitions/{number:05d}", fingerprint=made.fingerprint,
            references=made.counts["references"], nouns=made.counts["nouns"],
        )
        for number, made in enumerate(partitions)
    )  # fmt: skip
    heading = {field.name: getattr(whole, field.name) for field in dataclasses.fields(fmt.Heading)}
    manifest = fmt.PartitionedManifest(**heading | {"partitions": infos, "fingerprint": "d" * 64})
    return store.publish_partitioned(url, manifest, files={"partition_tree": tree}, **storage)


def divide(folder, groups, target, scratch: Path):
    """Divides a published collection in a local folder; groups are the nouns of each partition."""
    from ovref.reduce.compact import compact

    made = []
    for number, nouns in enumerate(groups):
        work = scratch / f"divide{number}"
        shutil.copytree(folder, work / "copy")
        with ReferenceCollection.open(folder) as collection:
            others = [noun for noun in collection.nouns if noun not in nouns]
            gone = collection.ids_of(nouns=others).tolist()
        store.tombstone(str(work / "copy"), gone, "of another partition")
        manifest, paths = compact(*store.fetch(str(work / "copy")), work / "compact")
        files = work / "files"
        files.mkdir()
        for role, path in paths.items():
            shutil.copy(path, files / (fmt.EMBEDDINGS["float16"] | fmt.OPTIONAL_FILES)[role])
        made.append(store.publish(files, f"{target}/partitions/{number:05d}", manifest))
    return publish_partitioned(store.read_manifest(str(folder)), made, str(target), scratch)


class Divided:
    """A partitioned collection at `url`, and where each reference of the undivided one is in it."""

    def __init__(self, built, groups, scratch: Path, url: str, **storage):
        parts = [part_of(built, nouns, number) for number, nouns in enumerate(groups)]
        made = [
            store.publish(
                part.write(scratch / f"{number}"), f"{url}/partitions/{number:05d}",
                part.manifest(), **storage,
            )
            for number, part in enumerate(parts)
        ]  # fmt: skip
        self.url, self.built = url, built
        self.manifest = publish_partitioned(built.manifest(), made, url, scratch, **storage)
        self.ids = np.empty(len(built.noun_of), dtype=np.int64)
        """(references,): the id here of each reference of the undivided collection."""
        for number, part in enumerate(parts):
            self.ids[part.kept] = np.arange(len(part.kept)) + number * fmt.PARTITION_IDS
        self._undivided = {int(i): row for row, i in enumerate(self.ids)} | {-1: -1}

    def undivided(self, ids):
        """The ids in the undivided collection of ids here, of any shape."""
        return np.vectorize(self._undivided.__getitem__, otypes=[np.int64])(ids)
