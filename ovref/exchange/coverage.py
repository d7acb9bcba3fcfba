"""How well a collection covers the classes of a list: support, tightness, separation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc

from ovref.exchange.class_lists import Classes
from ovref.exchange.clip_agreement import ClipAgreement, Pictures, clip_agreement, thinned
from ovref.ops.quality import agreement_with_others
from ovref_inference.collection.class_support import MEANINGLESS, ClassSupport, class_support
from ovref_inference.collection.prototypes import Prototypes
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.vectors import l2_normalised

FEW = 10
"""Classes with fewer references than this get the verdict `few`."""
SAMPLE = 1000
"""Maximum number of references per class used to measure it."""
COMPARED = 200
"""Maximum number of references per class compared with the prototypes of all others."""
HEATMAPS = "daam"
"""Source of references whose score is their heatmap's contrast (`ops.binarisation.contrast`)."""
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
    synonyms: tuple[str, ...] = ()
    """Its other names."""
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
    outliers: float | None = None
    """Share of its references that agree much less with the others than most of them do
    (`ops.quality.agreement_with_others`)."""
    taken_share: float | None = None
    """Share of its references that are nearer to a prototype of another class than to its own."""
    taken_for: str | None = None
    """The class that most of those are nearest to."""
    contrast: float | None = None
    """Mean contrast of their attribution heatmaps; None where they are of another source."""
    clip: ClipAgreement | None = None
    """CLIP's agreement with their images; None where it was not asked or there are none."""

    @property
    def own(self) -> int:
        """Number of references by name and by synonym."""
        return self.by_name + self.by_synonym

    @property
    def references(self) -> int:
        """Number of references that represent the class."""
        return self.own + self.by_neighbours

    @property
    def confusable(self) -> bool:
        """Whether the prototypes of another class are at least as near as its own references."""
        if self.tightness is None or self.similarity is None:
            return False
        return self.similarity >= self.tightness


def coverage(
    collection: ReferenceCollection,
    classes: Classes,
    *,
    measured: bool = True,
    pictures: Pictures | None = None,
) -> list[ClassCoverage]:
    """The coverage of each class, the weakest first: none, borrowed, few, own; within these,
    confusable classes first, then those with fewer references.

    Names outside the vocabulary are compared with it by the collection's text encoder, which is
    loaded only if there are any. Reads at most SAMPLE references per class.

    Args:
        collection: the collection.
        classes: the classes and their synonyms.
        measured: whether to make prototypes and read references, for what is None otherwise;
            without, it takes a few milliseconds.
        pictures: the images of references, for what CLIP says of them; needs `measured`.

    Raises:
        ModelError: the text encoder cannot be loaded.
    """
    names = classes.query_names
    prototypes = collection.prototypes(names) if measured else None
    support = _support(collection, names) if prototypes is None else prototypes.support
    counts = dict(zip(collection.nouns, collection.noun_counts.tolist(), strict=True))
    rows = [
        _row(name, [(names[i], support[i]) for i in np.flatnonzero(classes.class_of == at)], counts)
        for at, name in enumerate(classes.names)
    ]
    if prototypes is not None:
        rows = _measured(collection, classes, prototypes, rows, pictures)
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
    """Counts the references of the nouns that represent a class, each noun once; `found` has the
    names of the class and their support."""
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
        synonyms=tuple(other for other, _ in found if other != name),
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
    pictures: Pictures | None,
) -> list[ClassCoverage]:
    """The rows of classes, in their order, with what their prototypes and references say."""
    sets, others, samples = [], [], []
    for at, row in enumerate(rows):
        of_class = np.flatnonzero(classes.class_of == at)
        vectors = [prototypes.vectors_nkd[i, : prototypes.counts[i]] for i in of_class]
        sets.append(np.concatenate(vectors))
        own = {noun for i in of_class for noun in prototypes.support[i].nouns}
        used = dict.fromkeys(noun for i in of_class for noun in prototypes.nouns[i])
        others.append(tuple(noun for noun in used if noun not in own))
        samples.append(_sample(collection, _own_nouns(classes, prototypes, at, row)))
    nearest, similarity = nearest_sets(sets)
    heatmaps = _heat_scores(collection)
    asked = clip_agreement(collection, classes, samples, pictures) if pictures else None
    filled = [at for at, vectors in enumerate(sets) if len(vectors)]
    starts = np.cumsum([0, *(len(sets[at]) for at in filled[:-1])])
    every_nd = np.concatenate(sets)  # empty sets add nothing
    found = []
    for at, (row, ids) in enumerate(zip(rows, samples, strict=True)):
        changes: dict[str, Any] = {"others": others[at], "clip": asked[at] if asked else None}
        if nearest[at] >= 0:
            changes["nearest"] = classes.names[nearest[at]]
            changes["similarity"] = float(similarity[at])
        if len(ids):
            vectors_nd = l2_normalised(collection.visual[ids])
            taken_share, taken_for = _taken(
                thinned(vectors_nd, COMPARED), every_nd, starts, filled, at
            )
            heat = _contrasts(heatmaps, ids)
            changes |= {
                "tightness": float((vectors_nd @ sets[at].T).max(1).mean()),
                "outliers": float(agreement_with_others(vectors_nd)[1].mean()),
                "taken_share": taken_share,
                "taken_for": None if taken_for is None else classes.names[taken_for],
                "contrast": float(heat.mean()) if len(heat) else None,
            }
        found.append(replace(row, **changes))
    return found


def _own_nouns(classes: Classes, prototypes: Prototypes, at: int, row: ClassCoverage) -> list[str]:
    """The nouns whose references represent a class."""
    if row.verdict == "none":
        return []
    if row.verdict == "borrowed":
        return [row.noun or ""]
    support = [prototypes.support[i] for i in np.flatnonzero(classes.class_of == at)]
    return list(dict.fromkeys(one.nouns[0] for one in support if one.source == "own"))


def _sample(collection: ReferenceCollection, nouns: list[str]) -> np.ndarray:
    """Ids of the nouns' references, ascending, evenly thinned to at most SAMPLE."""
    if not nouns:
        return np.zeros(0, np.int64)
    ids = np.sort(np.concatenate([collection.references_of(noun) for noun in nouns]))
    return thinned(ids, SAMPLE)


def _heat_scores(collection: ReferenceCollection) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the references that have a heatmap, ascending, and the contrast of each, float32."""
    table = collection.to_table(["id", "score", "source"])
    here = table.filter(pc.equal(table.column("source"), HEATMAPS))
    return here.column("id").to_numpy(), here.column("score").to_numpy()


def _contrasts(heatmaps: tuple[np.ndarray, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """The contrasts of those of the references that have a heatmap (`_heat_scores`)."""
    known, contrasts = heatmaps
    places = np.searchsorted(known, ids)
    inside = places < len(known)
    places = places[inside]
    return contrasts[places[known[places] == ids[inside]]]


def _taken(
    vectors_nd: np.ndarray, every_md: np.ndarray, starts: np.ndarray, filled: list[int], own: int
) -> tuple[float, int | None]:
    """The share of a class's references that are nearer to another class, and which most are.

    Args:
        vectors_nd: (n, d), L2-normalised; n at least 1.
        every_md: (m, d) prototypes of all classes, class by class.
        starts: where those of each class with prototypes begin.
        filled: numbers of the classes with prototypes.
        own: number of the class, which has prototypes.
    """
    cosines_nc = np.maximum.reduceat(vectors_nd @ every_md.T, starts, axis=1)
    own_n = cosines_nc[:, filled.index(own)] + 1e-6  # classes may share their prototypes
    best_n = cosines_nc.argmax(1)
    taken = best_n[cosines_nc.max(1) > own_n]
    if not len(taken):
        return 0.0, None
    return len(taken) / len(vectors_nd), filled[int(np.bincount(taken).argmax())]


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
