"""The configuration of a build."""

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any

from ovref.config import STRICT
from ovref.corpora import CorpusSpec
from ovref.corpora.spec import MINIATURE
from ovref.locations import absolute, absolute_local
from ovref.reduce.spec import ReduceSpec
from ovref.select_prompts import SelectPrompts
from ovref.stages.embed import Embed
from ovref.stages.extract_nouns import ExtractNouns
from ovref.stages.ground import Ground
from ovref.stages.synthesize import Synthesize
from ovref.stages.true_masks import TrueMasks
from ovref_inference.ranges import require_at_least
from ovref_pipelines import shipped
from ovref_pipelines.engine.config import EngineConfig
from ovref_pipelines.output import BuildOutput, layout


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """All settings of a build. Stored in the output as `build.json`."""

    __pydantic_config__ = STRICT

    output: str
    """Folder or URL (`s3://bucket/prefix`) of the steps, the report and the collection."""
    corpus: CorpusSpec
    """The captions."""
    embed: Embed
    """How references are made from regions."""
    synthesize: Synthesize | None = None
    """How images are generated from prompts; or instead:"""
    ground: Ground | None = None
    """How the nouns of captions are located in the corpus's images; or instead:"""
    true_masks: TrueMasks | None = None
    """How regions are made of the masks that a labelled set comes with (`corpus.labels`)."""
    extract_nouns: ExtractNouns = field(default_factory=ExtractNouns)
    """How nouns are extracted from captions."""
    select_prompts: SelectPrompts | None = None
    """Limits the prompts of common nouns; None keeps all."""
    reduce: ReduceSpec = field(default_factory=ReduceSpec)
    """How the collection is made from references."""
    shard_size: int = 64
    """Captions per shard, the unit of work and commit: the most that a kill can lose."""
    images_from: str | None = None
    """Output of another build of the same corpus, nouns and images, whose images this build embeds
    with other settings instead of making its own. None makes them here."""
    collection: str | None = None
    """Where the collection is published; None for `collection` in the output."""
    base: str | None = None
    """A published collection to grow: its references stay, the new ones are added. To grow it in
    place, give its URL as `collection` too. None starts a new collection."""
    replace: bool = False
    """Whether a collection made with other settings may be replaced."""
    accept_older: bool = False
    """Whether to reuse steps that an earlier version of a stage made with the same settings. The
    current version makes their missing shards."""
    allow_incomplete: bool = False
    """Whether to publish a collection although shards have failed permanently."""
    licences: tuple[str, ...] = ()
    """Additional licences for the manifest, as `<name>: <licence>`, where the name is a
    model's id or free text. Licences of known models are added automatically."""
    work: str | None = None
    """Work folder for reducing, shared by all machines of a cluster, with space for five times the
    embeddings. None takes `_reduce` in a local output, otherwise the machine's temporary folder,
    in which case only this machine reduces. With `reduce.partition_references` all machines do:
    each has its own, with space for five times the embeddings of the partitions that it makes at
    a time."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Where shards run; not part of any step's identity."""

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output must name a folder or URL, found an empty string")
        require_at_least("shard_size", self.shard_size, 1)
        names = ("synthesize", "ground", "true_masks")
        found = [name for name in names if getattr(self, name) is not None]
        if len(found) != 1:
            raise ValueError(
                "images are either generated (synthesize) or the corpus's own (ground, or "
                f"true_masks of a labelled set), found {' and '.join(found) or 'none of them'}"
            )
        if self.uses_images and self.corpus.draws != 1:
            raise ValueError(
                f"corpus.draws applies to generated images; with {found[0]} it must be 1, found "
                f"{self.corpus.draws}"
            )
        if (self.corpus.labels is None) == (self.extract_nouns.source == "labels"):
            raise ValueError(
                "extract_nouns.source=labels takes the nouns of a corpus with `corpus.labels`, and "
                "such a corpus has no other nouns: set both, or neither"
            )
        if self.true_masks is not None and self.corpus.labels is None:
            raise ValueError("true_masks needs a labelled set: set corpus.labels")

    @property
    def make_images(self) -> Any:
        """The `Spec` of the stage that turns prompts into images with regions."""
        return self.synthesize or self.ground or self.true_masks

    @property
    def uses_images(self) -> bool:
        """Whether the images are the corpus's own."""
        return self.synthesize is None


def with_absolute_places(config: BuildConfig) -> BuildConfig:
    """The configuration with absolute places (`ovref.locations`).

    Raises:
        ConfigError: one of them is not a place.
    """

    def placed(name: str) -> str | None:
        place = getattr(config, name)
        return None if place is None else absolute(place, name)

    corpus = dataclasses.replace(config.corpus, path=shipped.beside(config.corpus.path))
    labels = corpus.labels
    if labels is not None and (corpus.format == "open_images" or "/" in labels.names):
        labels = dataclasses.replace(labels, names=_absolute_files(labels.names))
        corpus = dataclasses.replace(corpus, labels=labels)
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
