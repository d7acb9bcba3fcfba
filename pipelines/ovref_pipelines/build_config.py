"""The configuration of a build."""

import dataclasses
import os
from dataclasses import dataclass, field

from ovref.config import STRICT
from ovref.contract import Spec
from ovref.corpora import CorpusSpec
from ovref.corpora.spec import MINIATURE
from ovref.places import absolute, absolute_local
from ovref.reduce.spec import ReduceSpec
from ovref.select_prompts import SelectPrompts
from ovref.stages.embed import Embed
from ovref.stages.extract_nouns import ExtractNouns
from ovref.stages.ground import Ground
from ovref.stages.synthesize import Synthesize
from ovref_pipelines import shipped
from ovref_pipelines.engine.config import EngineConfig
from ovref_pipelines.output import BuildOutput, layout


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Everything a build needs to know. The output keeps it as `build.json`."""

    __pydantic_config__ = STRICT

    output: str
    """Folder or URL (`s3://bucket/prefix`) of the steps, the report and the collection."""
    corpus: CorpusSpec
    """The captions."""
    embed: Embed
    """How regions become references."""
    synthesize: Synthesize | None = None
    """How prompts are drawn; or else:"""
    ground: Ground | None = None
    """How the nouns of captions are found in the images that the corpus has."""
    extract_nouns: ExtractNouns = field(default_factory=ExtractNouns)
    """How nouns are found in captions."""
    select_prompts: SelectPrompts | None = None
    """Draws no more prompts of common nouns than are of use; None draws all."""
    reduce: ReduceSpec = field(default_factory=ReduceSpec)
    """How references become a collection."""
    shard_size: int = 64
    """Captions per shard, the unit of work and of commit: what a kill can cost at most."""
    images_from: str | None = None
    """Output of an earlier build of the same corpus, nouns and images, which this one embeds in
    another way: its steps up to the images are used, not repeated. None makes them here."""
    collection: str | None = None
    """Where the collection is published; None for `collection` in the output."""
    base: str | None = None
    """A published collection to grow: its references stay, the new ones are added. To grow it in
    place, give its URL as `collection` too. None starts a new collection."""
    replace: bool = False
    """Whether a collection made with other settings may be replaced."""
    accept_older: bool = False
    """Whether steps that an earlier version of a stage made with the same settings are used as they
    are. What is missing in them is then made by the present version."""
    allow_incomplete: bool = False
    """Whether to publish a collection although shards have failed for good."""
    licences: tuple[str, ...] = ()
    """Licences to be stated in the collection's manifest, as `<name>: <licence>`, besides those of
    known models: of a model by its id, of anything else in words."""
    work: str | None = None
    """Folder for reducing, with room for five times the embeddings, that all machines of a cluster
    share. None for `_reduce` in a local output, and otherwise a place in the machine's temporary
    folder; then reducing uses this machine alone."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Where the shards run; no part of any step's identity."""

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output must name a folder or URL, found an empty text")
        if self.shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, found {self.shard_size}")
        if (self.synthesize is None) == (self.ground is None):
            both = "neither" if self.ground is None else "both"
            raise ValueError(
                f"images are either drawn (synthesize) or the corpus's own (ground), found {both}"
            )
        if self.ground is not None and self.corpus.draws != 1:
            raise ValueError(
                f"corpus.draws is of images that are drawn; with ground it must be 1, found "
                f"{self.corpus.draws}"
            )

    @property
    def make_images(self) -> Spec:
        """The stage that turns prompts into images with regions."""
        return self.synthesize or self.ground


def with_absolute_places(config: BuildConfig) -> BuildConfig:
    """The configuration with places that mean the same from every folder (`ovref.places`).

    Raises:
        ConfigError: one of them is no place.
    """

    def placed(name: str) -> str | None:
        place = getattr(config, name)
        return None if place is None else absolute(place, name)

    corpus = dataclasses.replace(config.corpus, path=shipped.beside(config.corpus.path))
    if not corpus.path.startswith(MINIATURE):
        corpus = dataclasses.replace(
            corpus,
            path=_absolute_files(corpus.path),
            images=None if corpus.images is None else _absolute_files(corpus.images),
        )
    return dataclasses.replace(
        config,
        corpus=corpus,
        output=absolute(config.output, "output"),
        images_from=placed("images_from"),
        collection=placed("collection"),
        base=placed("base"),
        work=None if config.work is None else absolute_local(config.work, "work"),
    )


def _absolute_files(place: str) -> str:
    return place if "://" in place else os.path.abspath(os.path.expanduser(place))


def output_of(config: BuildConfig) -> BuildOutput:
    """Where the steps and the collection of a build are, or will be."""
    return layout(
        config.output,
        images_from=config.images_from,
        collection=config.collection,
        selects=config.select_prompts is not None,
    )
