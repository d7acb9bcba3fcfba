"""Decides whether a collection supports a class.

Retrieval always finds something, so a class unknown to a collection would get references of
unrelated nouns. A class that is not one of the collection's nouns may therefore borrow references
only if its text is near enough to a noun. Text encoders differ in their range of cosines, so
nearness is measured relative to the collection's own nouns (`relative_cosine`). A text encoder may
also not know the class and embed it close to meaningless words, so the class must be much nearer to
the noun than to any of those (MEANINGLESS_RATIO). The study behind both numbers is
`tests/benchmarks/results/support.md`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from ovref_inference.collection.words import find_in

FLOOR = 0.45
"""Default of the lowest relative cosine at which a class may borrow references."""

MEANINGLESS = (
    "qwertz", "xqvz", "blorfin", "zumquat", "frobnitz", "vlimmer", "asdfgh", "korpatsch", "yyk",
    "drendle", "gnuxi", "plothar", "brillig", "snarv", "mxyplk", "tove", "wuggle", "fendle", "zzz",
    "hjkl",
)  # fmt: skip
"""Made-up words that no text encoder can know."""

MEANINGLESS_RATIO = 0.5
"""A class borrows only if its distance to the noun, 1 - cosine, is below this fraction of its
distance to the nearest of MEANINGLESS."""

_NOUNS_COMPARED = 2000


class Vocabulary(Protocol):
    """What `class_support` needs of a collection."""

    @property
    def nouns(self) -> Sequence[str]:
        """Sorted."""

    @property
    def noun_embeddings(self) -> np.ndarray: ...
    @property
    def noun_counts(self) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class ClassSupport:
    """Where the references of one class come from."""

    source: Literal["own", "borrowed", "none"]
    nouns: tuple[str, ...]
    """The noun itself; or the nearest noun, whose references are borrowed or, for a class without
    support, too far away; empty for a collection without references."""
    cosine: float
    """Cosine of the class's text to that noun's."""

    def __str__(self) -> str:
        if self.source == "own":
            return "own references"
        nearest = f"{', '.join(self.nouns)} at cosine {self.cosine:.2f}"
        if self.source == "borrowed":
            return f"borrowed from {nearest}"
        return f"none (nearest: {nearest})" if self.nouns else "none"


def class_support(
    collection: Vocabulary,
    names: Sequence[str],
    embeddings_cd: np.ndarray,
    *,
    floor: float | None = FLOOR,
    meaningless: Callable[[], np.ndarray] | None = None,
) -> tuple[ClassSupport, ...]:
    """The support of each class.

    Args:
        collection: only nouns with references count.
        names: classes; compared with nouns in lower case, stripped of surrounding spaces.
        embeddings_cd: (c, d) text embeddings of the classes, L2-normalised.
        floor: lowest relative cosine at which a class borrows; None lets every class borrow.
        meaningless: called, if needed, for the (m, d) text embeddings of MEANINGLESS by the same
            encoder; None skips the comparison with them.

    Raises:
        ValueError: the embeddings are not as wide as those of the nouns.
    """
    nouns, counts = collection.nouns, collection.noun_counts
    found = dict[int, ClassSupport]()
    for row, name in enumerate(names):
        noun = name.strip().lower()
        at = find_in(nouns, noun)
        if at is not None and counts[at] > 0:
            found[row] = ClassSupport(source="own", nouns=(noun,), cosine=1.0)
    rest = [row for row in range(len(names)) if row not in found]
    if not rest:
        return tuple(found[row] for row in range(len(names)))
    present = np.flatnonzero(counts > 0)
    if not len(present):
        nothing = ClassSupport(source="none", nouns=(), cosine=0.0)
        return tuple(found.get(row, nothing) for row in range(len(names)))
    vocabulary_vd = collection.noun_embeddings[present]
    if embeddings_cd.shape[1] != vocabulary_vd.shape[1]:
        raise ValueError(
            f"expected textual embeddings of width {vocabulary_vd.shape[1]} as those of the "
            f"collection's nouns, found {embeddings_cd.shape[1]}; use its own text encoder"
        )
    cosines = embeddings_cd[rest] @ vocabulary_vd.T
    nearest, best = cosines.argmax(1), cosines.max(1)
    enough = np.ones(len(rest), dtype=bool)
    if floor is not None:
        enough = relative_cosine(best, vocabulary_vd) >= floor
        if meaningless is not None:
            strange = (embeddings_cd[rest] @ meaningless().T).max(1)
            enough &= 1 - best < MEANINGLESS_RATIO * (1 - strange)
    for at, row in enumerate(rest):
        found[row] = ClassSupport(
            source="borrowed" if enough[at] else "none",
            nouns=(nouns[present[nearest[at]]],),
            cosine=float(best[at]),
        )
    return tuple(found[row] for row in range(len(names)))


def relative_cosine(cosines: np.ndarray, vocabulary_vd: np.ndarray) -> np.ndarray:
    """Cosines on the scale of a vocabulary: 0 is the median over pairs of its nouns, 1 is equality.

    Args:
        cosines: of any shape.
        vocabulary_vd: (v, d) embeddings of nouns, L2-normalised. Of more than 2,000, an even sample
            is used; for a single one the median is taken as 0.
    """
    step = -(-len(vocabulary_vd) // _NOUNS_COMPARED)
    some_vd = vocabulary_vd[::step]
    between = (some_vd @ some_vd.T)[np.triu_indices(len(some_vd), 1)]
    middle = float(np.median(between)) if len(between) else 0.0
    return (cosines - middle) / max(1.0 - middle, 1e-6)
