"""A collection of the tests divided into partitions by noun."""

import dataclasses
from pathlib import Path

import numpy as np

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


class Divided:
    """A partitioned collection at `url`, and where each reference of the undivided one is in it."""

    def __init__(self, built, groups, scratch: Path, url: str, **storage):
        parts = [part_of(built, nouns, number) for number, nouns in enumerate(groups)]
        infos = []
        for number, part in enumerate(parts):
            path = f"partitions/{number:05d}"
            made = store.publish(
                part.write(scratch / path), f"{url}/{path}", part.manifest(), **storage
            )
            infos.append(
                fmt.PartitionInfo(
                    path=path, fingerprint=made.fingerprint,
                    references=made.counts["references"], nouns=made.counts["nouns"],
                )
            )  # fmt: skip
        tree = scratch / "partition_tree.npz"
        np.savez(tree, thresholds=np.arange(3))
        heading = {
            f.name: getattr(built.manifest(), f.name) for f in dataclasses.fields(fmt.Heading)
        }
        manifest = fmt.PartitionedManifest(**heading | {"partitions": tuple(infos)})
        self.url, self.built = url, built
        self.manifest = store.publish_partitioned(
            url, manifest, files={"partition_tree": tree}, **storage
        )
        self.ids = np.empty(len(built.noun_of), dtype=np.int64)
        """(references,): the id here of each reference of the undivided collection."""
        for number, part in enumerate(parts):
            self.ids[part.kept] = np.arange(len(part.kept)) + number * fmt.PARTITION_IDS
        self._undivided = {int(i): row for row, i in enumerate(self.ids)} | {-1: -1}

    def undivided(self, ids):
        """The ids in the undivided collection of ids here, of any shape."""
        return np.vectorize(self._undivided.__getitem__, otypes=[np.int64])(ids)
