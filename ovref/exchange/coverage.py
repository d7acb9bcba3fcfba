"""How well a collection covers the classes of a list: support, tightness, separation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ovref.exchange.class_lists import Classes
from ovref_inference.collection.class_support import MEANINGLESS, ClassSupport, class_support
from ovref_inference.collection.prototypes import Prototypes
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.vectors import l2_normalised

FEW = 10
"""Classes with fewer references than this get the verdict `few`."""
SAMPLE = 1000
"""Maximum number of references per class used to measure tightness."""
_ROWS = 512
"""Prototypes compared with all others at a time."""
_WEAKEST = ("none", "borrowed", "few", "own")


@dataclass(frozen=True, kw_only=True)
class ClassCoverage:
    """How well a collection covers one class.

    The class's prototypes are those of all its names with support (`class_support`), the same that
    a segmenter compares with.
    """

    name: str
    verdict: Literal["none", "borrowed", "few", "own"]
    """`own`: references by name or synonym; `few`: fewer than FEW of them; `borrowed`: those of a
    near noun; `none`."""
    noun: str | None
    """The noun that represents the class or lends to it; the nearest noun of a class without
    support."""
    cosine: float
    """Cosine between the texts of the class and that noun; the maximum over its names."""
    by_name: int
    """Number of references of the noun that equals the class's name."""
    by_synonym: int
    """Number of references of nouns that are synonyms."""
    by_neighbours: int
    """Number of references borrowed from the nearest noun by a class without its own."""
    others: tuple[str, ...] = ()
    """Other nouns whose references contribute to its prototypes, because it has few or none."""
    tightness: float | None = None
    """Mean cosine between each of its references and the nearest of its prototypes."""
    nearest: str | None = None
    """The class with the nearest prototypes."""
    similarity: float | None = None
    """Maximum cosine between a prototype of this class and one of the nearest class."""

    @property
    def references(self) -> int:
        """Number of references that represent the class."""
        return self.by_name + self.by_synonym + self.by_neighbours

    @property
    def confusable(self) -> bool:
        """Whether the prototypes of another class are at least as near as its own references."""
        if self.tightness is None or self.similarity is None:
            return False
        return self.similarity >= self.tightness


def coverage(
    collection: ReferenceCollection, classes: Classes, *, measured: bool = True
) -> list[ClassCoverage]:
    """The coverage of each class, the weakest first: none, borrowed, few, own; within these,
    confusable classes first, then those with fewer references.

    Names outside the vocabulary are compared with it by the collection's text encoder, which is
    loaded only if there are any. Reads at most SAMPLE references per class.

    Args:
        collection: the collection.
        classes: the classes and their synonyms.
        measured: whether to make prototypes, for `others`, `tightness`, `nearest` and `similarity`;
            without them, it takes a few milliseconds.

    Raises:
        ModelError: the text encoder cannot be loaded.
    """
    prototypes = collection.prototypes(classes.asked) if measured else None
    support = _support(collection, classes.asked) if prototypes is None else prototypes.support
    counts = dict(zip(collection.nouns, collection.noun_counts.tolist(), strict=True))
    rows = [
        _row(name, [(classes.asked[i], support[i]) for i in np.flatnonzero(classes.class_of == at)],
             counts)
        for at, name in enumerate(classes.names)
    ]  # fmt: skip
    if prototypes is not None:
        rows = _measured(collection, classes, prototypes, rows)
    return sorted(
        rows,
        key=lambda row: (
            _WEAKEST.index(row.verdict), not row.confusable, row.references, row.name,
        ),
    )  # fmt: skip


def _support(collection: ReferenceCollection, names: Sequence[str]) -> tuple[ClassSupport, ...]:
    counts = dict(zip(collection.nouns, collection.noun_counts.tolist(), strict=True))
    unknown = [at for at, name in enumerate(names) if not counts.get(name.strip().lower())]
    embeddings_cd = np.zeros((len(names), collection.manifest.textual.dim), np.float32)
    if unknown:
        embeddings_cd[unknown] = collection.embed_text([names[at] for at in unknown])
    return class_support(
        collection, names, embeddings_cd, meaningless=lambda: collection.embed_text(MEANINGLESS)
    )


def _row(name: str, found: list[tuple[str, ClassSupport]], counts: dict[str, int]) -> ClassCoverage:
    """Counts the references of the nouns that represent a class, each noun once.

    Args:
        found: names of the class and their support.
        counts: number of references of each noun.
    """
    own = dict.fromkeys(support.nouns[0] for _, support in found if support.source == "own")
    by_name = counts[name.strip().lower()] if name.strip().lower() in own else 0
    by_synonym = sum(counts[noun] for noun in own) - by_name
    ranked = sorted(
        (support for _, support in found),
        key=lambda support: (-_WEAKEST.index(support.source), -support.cosine),
    )
    best = ranked[0]
    borrowed = counts[best.nouns[0]] if best.source == "borrowed" else 0
    few = best.source == "own" and by_name + by_synonym < FEW
    return ClassCoverage(
        name=name,
        verdict="few" if few else best.source,
        noun=best.nouns[0] if best.nouns else None,
        cosine=best.cosine,
        by_name=by_name,
        by_synonym=by_synonym,
        by_neighbours=borrowed,
    )


def _measured(
    collection: ReferenceCollection,
    classes: Classes,
    prototypes: Prototypes,
    rows: list[ClassCoverage],
) -> list[ClassCoverage]:
    """The rows, in the order of the classes, completed with measures of the prototypes."""
    sets, others = [], []
    for at in range(len(classes.names)):
        of_class = np.flatnonzero(classes.class_of == at)
        vectors = [prototypes.vectors_nkd[i, : prototypes.counts[i]] for i in of_class]
        sets.append(np.concatenate(vectors))
        own = {noun for i in of_class for noun in prototypes.support[i].nouns}
        used = dict.fromkeys(noun for i in of_class for noun in prototypes.nouns[i])
        others.append(tuple(noun for noun in used if noun not in own))
    tight = [
        _tightness(collection, _own_nouns(classes, prototypes, at, row), vectors)
        for at, (row, vectors) in enumerate(zip(rows, sets, strict=True))
    ]
    nearest, similarity = nearest_sets(sets)
    return [
        replace(
            row,
            others=others[at],
            tightness=tight[at],
            nearest=classes.names[nearest[at]] if nearest[at] >= 0 else None,
            similarity=float(similarity[at]) if nearest[at] >= 0 else None,
        )
        for at, row in enumerate(rows)
    ]


def _own_nouns(classes: Classes, prototypes: Prototypes, at: int, row: ClassCoverage) -> list[str]:
    """The nouns whose references represent a class."""
    if row.verdict == "none":
        return []
    if row.verdict == "borrowed":
        return [row.noun or ""]
    support = [prototypes.support[i] for i in np.flatnonzero(classes.class_of == at)]
    return list(dict.fromkeys(one.nouns[0] for one in support if one.source == "own"))


def _tightness(
    collection: ReferenceCollection, nouns: list[str], prototypes_kd: np.ndarray
) -> float | None:
    """Mean cosine of the nouns' references, evenly sampled, to the nearest prototype."""
    if not nouns:
        return None
    ids = np.sort(np.concatenate([collection.references_of(noun) for noun in nouns]))
    ids = ids[:: -(-len(ids) // SAMPLE)]
    cosines = l2_normalised(collection.visual[ids]) @ prototypes_kd.T
    return float(cosines.max(1).mean())


def nearest_sets(sets: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """For each set of vectors, the nearest other set.

    Args:
        sets: c arrays (n_i, d), L2-normalised; n_i may be 0.

    Returns:
        (c,) int64 indices of the nearest sets, -1 for an empty set or if there is no other, and
        (c,) float32, the maximum cosine between their vectors.
    """
    filled = [at for at, vectors in enumerate(sets) if len(vectors)]
    nearest = np.full(len(sets), -1, np.int64)
    similarity = np.zeros(len(sets), np.float32)
    if len(filled) < 2:
        return nearest, similarity
    sizes = np.array([len(sets[at]) for at in filled])
    starts, owner = np.cumsum(sizes) - sizes, np.repeat(np.arange(len(filled)), sizes)
    every_nd = np.concatenate([sets[at] for at in filled])
    best_cc = np.full((len(filled), len(filled)), -np.inf, np.float32)
    for begin in range(0, len(every_nd), _ROWS):
        rows = slice(begin, begin + _ROWS)
        cosines = np.maximum.reduceat(every_nd[rows] @ every_nd.T, starts, axis=1)
        np.maximum.at(best_cc, owner[rows], cosines)
    np.fill_diagonal(best_cc, -np.inf)
    nearest[filled] = np.array(filled)[best_cc.argmax(1)]
    similarity[filled] = best_cc.max(1)
    return nearest, similarity
