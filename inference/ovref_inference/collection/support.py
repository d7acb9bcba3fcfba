"""The support set: what a search of the collection found."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ovref_inference.vectors import Vectors, prefetch_rows


class References(Protocol):
    """What a support set reads from its collection."""

    visual: Vectors
    """(n, d_visual)."""
    textual: Vectors
    """(n, d_textual)."""

    @property
    def nouns(self) -> Sequence[str]: ...

    def noun_rows(self, ids: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Support:
    """References found for n queries, nearest first."""

    ids: np.ndarray
    """(n, min(k, stored references)) int64; -1 at the end where deletions leave fewer."""
    scores: np.ndarray
    """(n, k) float32 cosine similarities; -inf where the id is -1."""
    collection: References = field(repr=False)

    @property
    def visual(self) -> np.ndarray:
        """(n, k, d_visual) float32 visual embeddings, read from the collection on access, while it
        is open; zero where the id is -1."""
        return self._vectors(self.collection.visual)

    @property
    def textual(self) -> np.ndarray:
        """(n, k, d_textual) float32 textual retrieval embeddings, read likewise; zero where the id
        is -1."""
        return self._vectors(self.collection.textual)

    @property
    def noun_rows(self) -> np.ndarray:
        """(n, k) int: index into `collection.nouns`; -1 where the id is -1."""
        return self.collection.noun_rows(self.ids)

    @property
    def nouns(self) -> list[list[str | None]]:
        """The noun of each reference; None where the id is -1."""
        words = self.collection.nouns
        return [[words[i] if i >= 0 else None for i in row] for row in self.noun_rows.tolist()]

    def _vectors(self, matrix: Vectors) -> np.ndarray:
        prefetch_rows(matrix, self.ids[self.ids >= 0])
        vectors = np.asarray(matrix[np.maximum(self.ids, 0)], dtype=np.float32)
        vectors[self.ids < 0] = 0.0
        return vectors
