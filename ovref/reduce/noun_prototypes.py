"""Phase 4: the vocabulary and the prototypes of every noun."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ovref.reduce.by_noun import NounRows, NounTable, partition_by_noun, read_vocabulary
from ovref.reduce.phases import Report, RunTasks, Task
from ovref.reduce.rows import Rows
from ovref_inference.collection.format import (
    FILES,
    NOUN_SCHEMA,
    TableWriter,
    VectorWriter,
    open_vectors,
    write_vectors,
)
from ovref_inference.collection.nouns import read_noun_embeddings, read_nouns
from ovref_inference.collection.prototypes import (
    PrototypeConfig,
    clustered_rows,
    make_prototypes,
    neighbours_of_many,
)
from ovref_inference.collection.retrieve import Texts, class_embeddings

NOUNS_A_TASK = 2048
SHOWN = 20
"""The most and the least frequent nouns in a summary."""


@dataclass(frozen=True, kw_only=True)
class GrownPrototypes:
    """The existing vocabulary of a collection that is being grown."""

    nouns: Path
    prototypes: Path
    references: int
    """Number of existing references; ids from here on are new."""
    excluded: np.ndarray
    """Sorted ids of the deleted references that its prototypes already exclude."""
    same_settings: bool
    """Whether its prototypes were made with the present version and settings."""


def build_prototypes(
    filtered: Path,
    out: Path,
    *,
    config: PrototypeConfig,
    grown: GrownPrototypes | None,
    deleted: np.ndarray,
    texts: Texts,
    templates: tuple[str, ...],
    known: Mapping[str, np.ndarray] | None = None,
    run_tasks: RunTasks,
    report: Report,
) -> dict[str, Any]:
    """Writes nouns.parquet, sorted by noun, and prototypes.f16.npy into `out`.

    A noun with at least `config.needed` references is clustered alone, a rarer one together with
    its neighbours in text space (VOCSeg 3.1), by the same functions as at query time. When a
    collection grows, a noun keeps its prototypes unless its own references or those of a neighbour
    were added or deleted. Memory: the noun of every reference and the vocabulary's text embeddings;
    each task holds one partition of `by_noun`, or one noun's visual embeddings.

    Args:
        deleted: sorted ids of deleted references; they are counted but not clustered.
        texts, templates: encode the nouns in the way queries encode class names.
        known: embeddings of nouns that need not be encoded, (d_textual,) float32 each.
    """
    vocabulary = read_vocabulary(filtered / FILES["references"])
    nouns, counts = vocabulary.nouns, vocabulary.counts
    old = _BaseNouns(grown)
    embeddings = _embeddings(nouns, old, known or {}, texts, templates)
    is_deleted = np.isin(vocabulary.order, deleted).astype(np.int64)
    live_counts = counts - np.add.reduceat(is_deleted, vocabulary.starts[:-1])
    used = _used(embeddings, live_counts, config, out, run_tasks)

    kept = old.kept(nouns, used, _touched(vocabulary, grown, deleted))
    fresh = [
        noun
        for noun in range(len(nouns))
        if kept[noun] is None and live_counts[used[noun]].sum() > 0
    ]
    wanted = np.zeros(len(nouns), dtype=bool)
    wanted[[other for noun in fresh for other in used[noun]]] = True
    partition_by_noun(filtered / FILES["visual"], vocabulary, wanted, out, run_tasks)
    np.save(out / "deleted.npy", deleted, allow_pickle=False)
    tasks: list[Task] = []
    for start in range(0, len(fresh), NOUNS_A_TASK):
        some = fresh[start : start + NOUNS_A_TASK]
        tasks.append(partial(_cluster, out, config, some, [used[noun] for noun in some]))

    supports = np.array([live_counts[of_noun].sum() if of_noun else 0 for of_noun in used])
    sizes = np.minimum(np.minimum(supports, config.max_references), config.k)
    made = _PrototypeReader(out)
    for done, path in enumerate(run_tasks(tasks), start=1):
        made.files.append(path)
        report("prototypes", done, len(tasks) + 1)
    stops = np.cumsum(sizes)
    width = Rows(filtered / FILES["visual"]).shape[1]
    with VectorWriter(out / FILES["prototypes"], int(stops[-1]), width) as writer:
        for noun, size in enumerate(sizes.tolist()):
            if size:
                stored = kept[noun]
                writer.append(made.next(size) if stored is None else stored)
    with TableWriter(out / FILES["nouns"], NOUN_SCHEMA) as table:
        table.append(
            {
                "noun": nouns,
                "count": counts,
                "embedding": list(embeddings),
                "prototype_start": stops - sizes,
                "prototype_stop": stops,
                "neighbours": [
                    [nouns[other] for other in of_noun if other != noun]
                    for noun, of_noun in enumerate(used)
                ],
            }
        )
    _remove_scratch(out)
    report("prototypes", len(tasks) + 1, len(tasks) + 1)
    return {
        "nouns": len(nouns),
        "rare_nouns": int((live_counts < config.needed).sum()),
        "prototypes": int(stops[-1]),
        "nouns_clustered": len(fresh),
        "most_frequent": _counted(nouns, counts, largest=True),
        "least_frequent": _counted(nouns, counts, largest=False),
    }


class NoTexts:
    """A text encoder where all nouns are encoded already."""

    def encode(self, texts: list[str]) -> NoReturn:
        raise ValueError(f"no text is encoded again, found {texts}")


def _embeddings(
    nouns: list[str],
    old: "_BaseNouns",
    known: Mapping[str, np.ndarray],
    texts: Texts,
    templates: tuple[str, ...],
) -> np.ndarray:
    """Encodes each noun alone, so that its bits do not depend on the rest of a batch."""
    return np.stack(
        [
            old.embedding(noun)
            if noun in old.row
            else known[noun]
            if noun in known
            else class_embeddings(texts, [noun], templates)[0]
            for noun in nouns
        ]
    )


def _used(
    embeddings: np.ndarray,
    live_counts: np.ndarray,
    config: PrototypeConfig,
    out: Path,
    run_tasks: RunTasks,
) -> list[list[int]]:
    """For every noun, the nouns whose references are clustered for it, itself first."""
    used = [[noun] for noun in range(len(embeddings))]
    rare = np.flatnonzero(live_counts < config.needed)
    np.save(out / "embeddings.npy", embeddings, allow_pickle=False)
    np.save(out / "live_counts.npy", live_counts, allow_pickle=False)
    tasks: list[Task] = [
        partial(_neighbours, out, config, rare[start : start + NOUNS_A_TASK].tolist())
        for start in range(0, len(rare), NOUNS_A_TASK)
    ]
    found = (neighbours for some in run_tasks(tasks) for neighbours in some)
    for noun, neighbours in zip(rare.tolist(), found, strict=True):
        used[noun] = neighbours
    return used


def _neighbours(out: Path, config: PrototypeConfig, rows: list[int]) -> list[list[int]]:
    embeddings = np.load(out / "embeddings.npy", allow_pickle=False)
    live_counts = np.load(out / "live_counts.npy", allow_pickle=False)
    return neighbours_of_many(np.array(rows, dtype=np.int64), embeddings, live_counts, config)


def _touched(
    vocabulary: NounTable, grown: GrownPrototypes | None, deleted: np.ndarray
) -> np.ndarray:
    """(nouns,) bool: nouns with a reference added or deleted since the grown collection."""
    if grown is None:
        return np.ones(len(vocabulary.nouns), dtype=bool)
    changed = vocabulary.order >= grown.references
    changed |= np.isin(vocabulary.order, np.setdiff1d(deleted, grown.excluded))
    return np.logical_or.reduceat(changed, vocabulary.starts[:-1])


class _BaseNouns:
    """The nouns of the collection that is being grown; empty for a new collection."""

    def __init__(self, grown: GrownPrototypes | None) -> None:
        self.row: dict[str, int] = {}
        self._same = grown is not None and grown.same_settings
        if grown is not None:
            self._table = read_nouns(grown.nouns)
            self._embeddings = read_noun_embeddings(grown.nouns)
            self._prototypes = open_vectors(grown.prototypes)
            self.row = {noun: row for row, noun in enumerate(self._table.names)}

    def embedding(self, noun: str) -> np.ndarray:
        return self._embeddings[self.row[noun]]

    def kept(
        self, nouns: list[str], used: list[list[int]], touched: np.ndarray
    ) -> list[np.ndarray | None]:
        """The prototypes of each noun that are still valid, or None."""
        found: list[np.ndarray | None] = [None] * len(nouns)
        for noun, of_noun in enumerate(used):
            row = self.row.get(nouns[noun])
            if not self._same or row is None or touched[of_noun].any():
                continue
            others = [self.row.get(nouns[other]) for other in of_noun if other != noun]
            if others == self._table.neighbours_of(row):
                start, stop = self._table.prototype_starts[row], self._table.prototype_stops[row]
                found[noun] = np.asarray(self._prototypes[start:stop])
        return found


def _cluster(folder: Path, config: PrototypeConfig, nouns: list[int], used: list[list[int]]) -> str:
    """Writes the prototypes of these nouns, concatenated, to a file; returns its name."""
    rows = NounRows(folder)
    deleted = np.load(folder / "deleted.npy", allow_pickle=False)

    def of_each() -> Iterator[np.ndarray]:
        for of_noun in used:
            ids = np.sort(np.concatenate([rows.ids(other) for other in of_noun]))
            yield rows.vectors(of_noun, clustered_rows(ids[~np.isin(ids, deleted)], config))

    found = [make_prototypes(vectors, config) for vectors in of_each()]
    path = folder / f"clustered_{nouns[0]:09d}.npy"
    write_vectors(path, np.concatenate(found))
    return path.name


class _PrototypeReader:
    """Reads prototypes in order from the files that the tasks wrote."""

    def __init__(self, folder: Path) -> None:
        self.files: list[str] = []
        self._folder, self._at = folder, 0
        self._current = np.zeros((0, 0), dtype=np.float16)

    def next(self, count: int) -> np.ndarray:
        if self._at == len(self._current):
            self._current, self._at = open_vectors(self._folder / self.files.pop(0)), 0
        self._at += count
        return np.asarray(self._current[self._at - count : self._at])


def _remove_scratch(out: Path) -> None:
    for path in out.iterdir():
        if path.name not in (FILES["nouns"], FILES["prototypes"]):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _counted(nouns: list[str], counts: np.ndarray, largest: bool) -> list:
    """[noun, references] of the most or least frequent nouns."""
    order = np.argsort(-counts if largest else counts, kind="stable")[:SHOWN]
    return [[nouns[i], int(counts[i])] for i in order]
