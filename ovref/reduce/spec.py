"""Settings that determine how references become a collection."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from ovref.class_files import list_of_file
from ovref.config import STRICT
from ovref.identity import ADDED_LATER
from ovref.locations import absolute
from ovref_inference.collection.prototypes import PrototypeConfig
from ovref_inference.ranges import require_at_least, require_within


def _words(value: Any) -> Any:
    """What a configuration gives for words: the content of the file, where it names one."""
    if isinstance(value, str):
        listed = list_of_file(absolute(value, "reduce.filter.blocked_captions")).classes
        return tuple(word for words in listed for word in words)
    return tuple(value) if isinstance(value, list) else value


Words = Annotated[tuple[str, ...], BeforeValidator(_words)]


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
    """If two visual embeddings of one noun have at least this cosine, only the first is kept; None
    keeps all."""
    min_noun_agreement: float | None = None
    """Lowest `ops.quality.noun_agreement` kept, in [0, 1]; None: not measured."""
    agreement_neighbours: int = 10
    """Nearest references on other images that the agreement is measured with."""
    agreement_min_elsewhere: int = 3
    """Nouns with fewer references than this on other images are too rare to measure, and kept."""
    outlier_deviations: float | None = field(default=None, metadata=ADDED_LATER)
    """Maximum number of median deviations by which a reference's cosine to the mean of the noun's
    other references may lie below the noun's median (`ops.quality.agreement_with_others`); None
    keeps all references."""
    min_clip_agreement: float | None = field(default=None, metadata=ADDED_LATER)
    """Lowest cosine of the box around a region to its noun by CLIP that is kept; None for no limit.
    Like the others below that need it, it needs `embed.measures`."""
    max_entropy: float | None = field(default=None, metadata=ADDED_LATER)
    """Highest entropy of an attribution heatmap that is kept, in [0, 1]. Needs `embed.measures`."""
    max_components: int | None = field(default=None, metadata=ADDED_LATER)
    """Most connected parts of a mask that is kept. Needs `embed.measures`."""
    max_unsafe: float | None = field(default=None, metadata=ADDED_LATER)
    """Highest probability, by `embed.measures.safety`, that an image is not safe; None keeps all,
    and counts those above 0.5 as flagged."""
    blocked_captions: Words = field(default=(), metadata=ADDED_LATER)
    """A text file of words and phrases, one a line: references whose captions have one are dropped,
    letter case aside, whole words only. They become the setting, as `extract_nouns.classes` does.
    In Python: the words."""

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
        for name in ("max_entropy", "max_unsafe"):
            if (value := getattr(self, name)) is not None:
                require_within(name, value, 0, 1)
        if self.max_components is not None:
            require_at_least("max_components", self.max_components, 1)
        if self.outlier_deviations is not None:
            require_at_least("outlier_deviations", self.outlier_deviations, 0)
        if not all(map(str.strip, self.blocked_captions)):
            raise ValueError("blocked_captions must be words, found an empty one")

    @property
    def filters(self) -> int:
        """Number of active filters, including the two that always are."""
        optional = (
            self.min_score, self.duplicate_cosine, self.min_noun_agreement, self.max_unsafe,
            self.outlier_deviations, self.min_clip_agreement, self.max_entropy, self.max_components,
        )  # fmt: skip
        on = sum(value is not None for value in optional)
        return 2 + self.limits_area + bool(self.blocked_captions) + on

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
    embeddings: Literal["float16", "int8"] = field(default="float16", metadata=ADDED_LATER)
    """How a published collection stores embeddings, and the codes of its visual index's inverted
    lists. `int8` takes half their bytes; prototypes are made before and stay float16, and so do the
    codes of the textual index. A visual index in int8 is made anew when the collection grows."""
    textual_embeddings: Literal["stored", "in_index"] = field(
        default="stored", metadata=ADDED_LATER
    )
    """Whether a published collection has a file of its textual embeddings. `in_index` omits it,
    about a fifth of the collection, and they are read from the textual index, which has the same
    numbers. CorrCLIP and RNS, which need them, then cannot read a remote collection in place."""
    partition_references: int | None = field(default=None, metadata=ADDED_LATER)
    """Most references of a partition, unless one noun has more. The collection is then made and
    stored in partitions of nouns that are near each other in text space, so that no machine holds
    more than one of them. None makes one undivided collection, in a work folder that holds all."""

    name: ClassVar[str] = "reduce"
    version: ClassVar[int] = 6

    def __post_init__(self) -> None:
        require_within("index_recall", self.index_recall, 0, 1, "(]")
        if self.partition_references is not None:
            require_at_least("partition_references", self.partition_references, 1)
