"""Settings that determine how references become a collection."""

from dataclasses import dataclass, field
from typing import ClassVar

from ovref.config import STRICT
from ovref_inference.collection.prototypes import PrototypeConfig
from ovref_inference.ranges import require_at_least, require_within


@dataclass(frozen=True, kw_only=True)
class FilterSpec:
    """Which references are dropped. Counts before and after each active filter are recorded.

    The defaults drop only what cannot be indexed (vectors that are not finite or not of unit
    length) and keys that occur twice.
    """

    __pydantic_config__ = STRICT

    min_score: float | None = None
    """Lowest score kept; None for no limit. The scale of scores depends on their source."""
    min_area: float = 0.0
    """Smallest mask kept, as a fraction of the image."""
    max_area: float = 1.0
    """Largest mask kept, as a fraction of the image."""
    duplicate_cosine: float | None = None
    """Of two visual embeddings of one noun with at least this cosine, only the first is kept; None
    keeps all."""
    min_noun_agreement: float | None = None
    """Lowest `ops.quality.noun_agreement` kept, in [0, 1]; None: not measured."""
    agreement_neighbours: int = 10
    """Nearest references on other images that the agreement is measured with."""
    agreement_min_elsewhere: int = 3
    """Nouns with fewer references than this on other images are too rare to measure, and kept."""

    def __post_init__(self) -> None:
        require_within("min_area", self.min_area, 0, 1)
        require_within("max_area", self.max_area, 0, 1)
        if self.min_noun_agreement is not None:
            require_within("min_noun_agreement", self.min_noun_agreement, 0, 1)
        if self.min_area > self.max_area:
            raise ValueError(
                f"min_area must not exceed max_area, found {self.min_area} and {self.max_area}"
            )
        if self.duplicate_cosine is not None:
            require_within("duplicate_cosine", self.duplicate_cosine, -1, 1, "(]")
        for name in ("agreement_neighbours", "agreement_min_elsewhere"):
            require_at_least(name, getattr(self, name), 1)

    @property
    def filters(self) -> int:
        """Number of active filters, including the two that always are."""
        optional = (self.min_score, self.duplicate_cosine, self.min_noun_agreement)
        return 2 + self.limits_area + sum(value is not None for value in optional)

    @property
    def limits_area(self) -> bool:
        return self.min_area > 0 or self.max_area < 1


@dataclass(frozen=True, kw_only=True)
class ReduceSpec:
    """Everything that determines how reference shards become a collection."""

    __pydantic_config__ = STRICT

    filter: FilterSpec = field(default_factory=FilterSpec)
    """Which references are dropped."""
    prototypes: PrototypeConfig = field(default_factory=PrototypeConfig)
    """Prototypes per noun, and where a rare noun borrows references from."""
    index_recall: float = 0.95
    """Mean recall against exact search that an approximate index is tuned to reach, with a margin
    for measurement error: at 10 to 350 neighbours, with class names as queries for the textual
    embeddings and held-out references for the visual ones. The worst tenth of these queries may
    miss four times as much: at 0.95 their recall is at least 0.8."""
    seed: int = 0
    """Seed of the samples for training and measuring an index."""

    name: ClassVar[str] = "reduce"
    version: ClassVar[int] = 5

    def __post_init__(self) -> None:
        require_within("index_recall", self.index_recall, 0, 1, "(]")
