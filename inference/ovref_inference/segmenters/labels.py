"""Matching nouns and trained classes to the requested classes, and checks of comparability."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from ovref_inference.collection.class_support import MEANINGLESS, ClassSupport, class_support
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.collection.retrieve import Texts, checked_names, class_embeddings
from ovref_inference.proposers.proposals import Proposals

_NAMES_AT_ONCE = 65_536

_Prepared = TypeVar("_Prepared")
"""What a segmenter knows of a list of classes."""


class BoundedCache(dict):
    """A dict that keeps only the most recent entries, so that a service with ever new lists of
    classes does not keep gigabytes of prototypes."""

    limit = 32

    def __setitem__(self, key: tuple[str, ...], value: Any) -> None:
        super().__setitem__(key, value)
        if len(self) > self.limit:
            self.pop(next(iter(self)), None)


def prepared_once(
    prepare: Callable[[Any, tuple[str, ...]], _Prepared],
) -> Callable[[Any, Sequence[str]], _Prepared]:
    """Makes a segmenter's `prepare` refuse bad class names (`checked_names`) and keep what it
    returns for the most recent lists of them (`BoundedCache`)."""

    @wraps(prepare)
    def of_names(self: Any, class_names: Sequence[str]) -> _Prepared:
        names = checked_names(class_names)
        known = vars(self).setdefault("_prepared", BoundedCache())
        # Kept in a name of its own: another thread may evict it from the cache.
        if (prepared := known.get(names)) is None:
            prepared = known[names] = prepare(self, names)
        return prepared

    return of_names


class NamedTexts:
    """Text embeddings of lists of names; each list is encoded once (`BoundedCache`)."""

    def __init__(self, text: Texts, templates: tuple[str, ...]) -> None:
        self._text, self._templates = text, templates
        self._known: dict[tuple[str, ...], np.ndarray] = BoundedCache()
        self._others: dict[tuple[str, ...], NamedTexts] = {}

    def with_templates(self, templates: tuple[str, ...]) -> "NamedTexts":
        """The same encoder with other templates."""
        if templates == self._templates:
            return self
        if templates not in self._others:
            self._others[templates] = NamedTexts(self._text, templates)
        return self._others[templates]

    def __call__(self, names: Sequence[str]) -> np.ndarray:
        """(n, d) float32, L2-normalised: `retrieve.class_embeddings`, with its errors."""
        key = checked_names(names)
        if key not in self._known:
            self._known[key] = class_embeddings(self._text, list(key), self._templates)
        return self._known[key]


def support_by_text(
    collection: ReferenceCollection, names: Sequence[str], texts: NamedTexts, floor: float | None
) -> tuple[ClassSupport, ...]:
    """`class_support` of the classes by their texts."""
    return class_support(
        collection, names, texts(names), floor=floor, meaningless=lambda: texts(MEANINGLESS)
    )


def supported_classes(
    collection: ReferenceCollection,
    names: Sequence[str],
    texts: NamedTexts,
    floor: float | None,
    consequence: str = "not be predicted",
) -> tuple[ClassSupport, ...]:
    """`support_by_text`; warns about classes without support, which will have this consequence.

    Raises:
        ValueError: no class has support.
    """
    support = support_by_text(collection, names, texts, floor)
    missing = [
        f"{name} ({one.nouns[0]} is nearest)" if one.nouns else name
        for name, one in zip(names, support, strict=True)
        if one.source == "none"
    ]
    if len(missing) == len(names):
        raise ValueError(f"{collection.url} has no references for any of {', '.join(missing)}")
    warn_without(collection.url, missing, consequence)
    return support


def warn_without(url: str, names: Sequence[str], consequence: str) -> None:
    """Warns about classes without references, if there are any."""
    if names:
        warnings.warn(
            f"{url} has no references for {', '.join(names)}: these classes will {consequence}",
            stacklevel=5,
        )


def missing_names(names: Sequence[str], support: Sequence[ClassSupport]) -> tuple[str, ...]:
    """The classes without support."""
    return tuple(n for n, one in zip(names, support, strict=True) if one.source == "none")


def match_labels(
    names: Sequence[str],
    embeddings_vd: np.ndarray,
    class_names: Sequence[str],
    class_embeddings_cd: np.ndarray,
    threshold: float = 0.95,
) -> np.ndarray:
    """The class of each name: one with the same spelling, or the nearest in text space (RetCLIP
    2.2).

    Args:
        names: v nouns or labels.
        embeddings_vd: (v, d) of the names, L2-normalised.
        class_names: c classes.
        class_embeddings_cd: (c, d) of the classes, by the same encoder and templates.
        threshold: the nearest class counts only if the cosine is above this.

    Returns:
        (v,) int64 indices into the classes; -1 for a name without a class. A class of the same
        spelling, ignoring case and surrounding spaces, wins; ties go to the first class.
    """
    same = {name.strip().lower(): i for i, name in reversed(list(enumerate(class_names)))}
    found = np.full(len(names), -1, dtype=np.int64)
    # In chunks, because millions of nouns times hundreds of classes would take gigabytes.
    for start in range(0, len(names), _NAMES_AT_ONCE):
        part = slice(start, start + _NAMES_AT_ONCE)
        cosines = embeddings_vd[part] @ class_embeddings_cd.T
        found[part] = np.where(cosines.max(1) > threshold, cosines.argmax(1), -1)
    for row, name in enumerate(names):
        found[row] = same.get(name.strip().lower(), found[row])
    return found


def in_vocabulary(
    class_probs_nc: np.ndarray, class_of_trained: np.ndarray, classes: int
) -> np.ndarray:
    """Probabilities of the requested classes by a proposer that was trained on others.

    A class gets the sum over the trained classes that match it. An untrained class gets the
    geometric mean over all trained ones, as an average logit would give: small where the proposer
    is confident in one of its own classes, and as small as they are where it predicts no object,
    which VOCSeg's fusion needs (3.2; there an embedding gives it). The probability of no object is
    dropped without renormalisation.

    Args:
        class_probs_nc: (n, t + 1) probabilities, the last of no object.
        class_of_trained: (t,) of `match_labels`.
        classes: number of requested classes.

    Returns:
        (n, classes) float32.
    """
    probabilities = class_probs_nc[:, :-1].astype(np.float64)
    typical = np.exp(np.log(np.maximum(probabilities, 1e-30)).mean(1))
    found = np.repeat(typical[:, None], classes, axis=1)
    for label in np.unique(class_of_trained[class_of_trained >= 0]):
        found[:, label] = probabilities[:, class_of_trained == label].sum(1)
    return found.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class TrainedScores:
    """What a trained proposer says of the asked classes."""

    scores_nc: np.ndarray
    """(n, classes) float32 in [0, 1]."""
    seen: np.ndarray
    """(classes,) bool: which of them it was trained on."""
    void_n: np.ndarray
    """(n,) float32: probability that a region shows no class, of a proposer that was trained on
    texts; zeros of another one, whose scores are small there."""


def trained_scores(
    found: Proposals, class_names: Sequence[str], texts: NamedTexts, threshold: float
) -> TrainedScores:
    """Scores of a trained proposer for the requested classes: `in_vocabulary`, or, of one that was
    trained on texts, the softmax over these classes, without void.

    Args:
        found: from a proposer with classes.
        class_names: the requested classes.
        texts: embeds names.
        threshold: of `match_labels`.

    Raises:
        ValueError: the proposer knows no classes; or it was trained on texts of another width.
    """
    if not found.knows_classes:
        raise ValueError("the proposer gives no class probabilities")
    stands_for = match_labels(
        found.trained_names,
        texts(found.trained_names),
        class_names,
        texts(class_names),
        threshold,
    )
    seen = np.isin(np.arange(len(class_names)), stands_for)
    if found.open_classes is not None:
        own = texts.with_templates(found.open_classes.templates)
        probabilities = found.open_classes.probabilities(own(class_names))
        void_n = probabilities[:, -1]
        asked_nc = probabilities[:, :-1]
        # Where void takes everything, the classes are left with what float32 resolves.
        total_n1 = np.maximum(asked_nc.sum(1, keepdims=True), np.finfo(np.float32).tiny)
        return TrainedScores(scores_nc=asked_nc / total_n1, seen=seen, void_n=void_n)
    assert found.class_probs_nc is not None
    scores_nc = in_vocabulary(found.class_probs_nc, stands_for, len(class_names))
    return TrainedScores(
        scores_nc=scores_nc, seen=seen, void_n=np.zeros(len(scores_nc), dtype=np.float32)
    )


def check_joint_space(url: str, dim_visual: int, texts_cd: np.ndarray) -> None:
    """Raises ValueError if visual embeddings cannot be compared with texts."""
    if texts_cd.shape[1] != dim_visual:
        raise ValueError(
            f"{url} has visual embeddings of width {dim_visual} and texts of width "
            f"{texts_cd.shape[1]}; this segmenter compares the two, so the collection must be "
            "built with the image tower of its own text encoder (CLIP)"
        )


def check_same_encoders(one: ReferenceCollection, other: ReferenceCollection) -> None:
    """Raises ValueError if references of two collections cannot be compared."""
    for name in ("visual", "textual", "templates"):
        a, b = getattr(one.manifest, name), getattr(other.manifest, name)
        if a != b:
            raise ValueError(
                f"{one.url} and {other.url} were built with different {name} settings, {a} and "
                f"{b}: their references cannot be compared"
            )
