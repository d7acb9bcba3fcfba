"""`ovref grow`: writes captions for the weak classes of a collection, builds them, adds them to it.

What the output of its build has besides:

    grow_captions.txt    the captions, one per line
    grow.json            what was asked, the coverage before and after, and whose caption is whose
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from ovref.config import load_tree, read_tree
from ovref.corpora import CorpusSpec
from ovref.corpora.readers import read_captions
from ovref.errors import ConfigError, InputError, MismatchError, StorageError
from ovref.exchange.class_lists import Classes, read_classes
from ovref.exchange.coverage import ClassCoverage, coverage
from ovref.exchange.new_captions import TEMPLATES, Wanted, new_captions, read_templates
from ovref.identity import changes, fingerprint
from ovref.licences import UNKNOWN
from ovref.locations import absolute, with_absolute_models
from ovref.storage.file_store import Store
from ovref_inference.collection import hub
from ovref_inference.collection import store as collections
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_pipelines import preflight, recipe, shipped
from ovref_pipelines.build_config import BuildConfig, output_of, with_absolute_places
from ovref_pipelines.output import BUILD, FOLDER, build_config, is_collection, open_build
from ovref_pipelines.recipe import BuildSummary, Say

CAPTIONS, GROWN = "grow_captions.txt", "grow.json"
MARGIN = 1.25
"""Captions for each reference that is missing: of some the mask is empty or too small."""
KEPT = ("extract_nouns", "synthesize", "embed", "reduce", "shard_size", "licences", "engine")
"""Settings of the build that made the collection that the new one has too."""
SAID = {"file": "given", "exchanged": "of a near noun", "template": "from templates"}
ARGUMENTS = {
    "output": "--output", "base": "COLLECTION", "corpus.path": "--captions",
    "extract_nouns.classes": "--classes",
}  # fmt: skip
"""Settings that are arguments of the verb."""


@dataclass(frozen=True, kw_only=True)
class Grow:
    """Settings of a growth."""

    place: str
    """A collection, or the output of a build."""
    classes: str
    """A class list, as `read_classes` takes it."""
    target: int
    """References that each class should have, its own or its synonyms'."""
    output: str
    """Output of the new build."""
    templates: str | None = None
    """A file of templates, in place of `TEMPLATES`."""
    captions: tuple[str, ...] = ()
    """Corpora whose captions are taken before others: any that `corpus.path` takes."""
    config: str | None = None
    """Settings of the new build; None takes those that made the collection."""
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.target < 1:
            raise ValueError(f"target must be at least 1, found {self.target}")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The captions of a growth, by class, and its build."""

    asked: dict[str, Any]
    """What was asked for; the same command must ask for the same."""
    classes: Classes
    before: tuple[ClassCoverage, ...]
    captions: tuple[tuple[str, str, str], ...]
    """Text, class and source of each."""
    config: BuildConfig
    """The build; its corpus is not written yet."""

    @property
    def weak(self) -> list[ClassCoverage]:
        """The classes that have fewer references than wanted, the weakest first."""
        return [row for row in self.before if row.own < self.asked["target"]]

    @property
    def text(self) -> bytes:
        """Content of the corpus."""
        return "".join(f"{text}\n" for text, _, _ in self.captions).encode()


def plan(grow: Grow) -> Plan:
    """The plan of a new or a resumed growth. Writes nothing.

    Raises:
        InputError: the collection, its settings or the class list are not there, its images were
            not generated, or no caption can be written.
        MismatchError: the output is of another growth, or the collection is partitioned and the
            build would not be, or the reverse.
        OvrefError: the text encoder or the tagger cannot be loaded.
    """
    collection, settings = _opened(grow)
    classes = read_classes(grow.classes)
    if grow.templates is not None:
        templates = read_templates(absolute(grow.templates, "--templates"))
    else:
        templates = TEMPLATES
    asked: dict[str, Any] = {
        "collection": collection, "classes": [list(names) for names in classes.classes],
        "target": grow.target, "templates": list(templates),
        "captions": [absolute(place, "--captions") for place in grow.captions],
    }  # fmt: skip
    output = Store.open(absolute(grow.output, "output"))
    config = _config(grow, asked, settings, output.url)
    preflight.check_base(config.base, config.reduce, config.embed)
    if output.exists(GROWN):
        return _resumed(output, asked, classes, config)
    if output.exists(BUILD):
        raise MismatchError(f"{output.url} is of another build: choose another output")
    with ReferenceCollection.open(collection) as opened:
        before = coverage(opened, classes)
        owned = {row.name: row.own for row in before if row.own < grow.target}
        draws = config.corpus.draws
        wanted = [
            Wanted(names=names, captions=_wanted(grow.target, owned[names[0]], draws))
            for names in classes.classes
            if names[0] in owned
        ]
        given = chain.from_iterable(
            read_captions(CorpusSpec(path=place)) for place in asked["captions"]
        )
        found = new_captions(opened, wanted, config.extract_nouns, templates=templates, given=given)
    if wanted and not found:
        raise InputError(
            f"no caption was found for {', '.join(owned)}: the tagger finds them in none of the "
            "templates; give captions of your own by --captions"
        )
    return Plan(
        asked=asked,
        classes=classes,
        before=tuple(before),
        captions=tuple((one.text, one.name, one.source) for one in found),
        config=config,
    )


def grow_collection(plan: Plan, say: Say) -> tuple[BuildSummary, list[ClassCoverage]]:
    """Builds the planned captions or resumes the build; returns its summary and the coverage
    afterwards.

    Raises:
        OvrefError, StoppedError: as of `recipe.build`.
    """
    output = Store.open(plan.config.output)
    if not output.exists(GROWN):
        output.write(CAPTIONS, plan.text)
        output.write(GROWN, _json(plan, None))
    counts = Counter(name for _, name, _ in plan.captions)
    say(f"grow: {len(plan.captions)} captions for {len(counts)} classes; see {CAPTIONS}")
    summary = recipe.build(plan.config, say)
    if summary.collection is None:
        return summary, []
    with ReferenceCollection.open(summary.collection_url) as collection:
        after = coverage(collection, plan.classes)
    output.write(GROWN, _json(plan, after))
    return summary, after


def with_corpus_in(plan: Plan, folder: str) -> BuildConfig:
    """The build with its corpus written into another folder, for a dry run."""
    store = Store.open(folder)
    store.write(CAPTIONS, plan.text)
    corpus = dataclasses.replace(plan.config.corpus, path=f"{store.url}/{CAPTIONS}")
    return dataclasses.replace(plan.config, corpus=corpus)


def _wanted(target: int, own: int, draws: int) -> int:
    """Number of captions to write for a class that has `own` references."""
    return math.ceil((target - own) * MARGIN / draws)


def _opened(grow: Grow) -> tuple[str, dict[str, Any]]:
    """The collection, and the settings of the build that made it."""
    place = absolute(grow.place, "place")
    if is_collection(place):
        collection = place
        build = "" if place.startswith(hub.PREFIX) else place.rpartition("/")[0]
    else:
        opened = open_build(place)
        collection, build = opened.collection.url, place
        if not opened.is_published:
            raise InputError(f"the build {place} has no collection yet: finish it first")
    made = collections.read_manifest(collection).build
    if grow.config is not None:
        return collection, _divided_as(made, read_tree(shipped.find(grow.config)))
    try:
        settings = build_config(Store.open(build)) if build else {}
    except StorageError:
        if build == place:
            raise
        settings = {}  # of whatever lies beside a collection
    if not settings:
        settings = _of_manifest(collection, made)
    corpus = settings.get("corpus") or {}
    settings = settings | {"corpus": {"licence": corpus.get("licence") or _licence(made)}}
    return collection, _divided_as(made, settings)


def _divided_as(made: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with the division of the collection, which may be a converted one."""
    most = made.get("reduce", {}).get("fields", {}).get("partition_references")
    return settings | {"reduce": (settings.get("reduce") or {}) | {"partition_references": most}}


def _licence(build: dict[str, Any]) -> str | None:
    """The licence of the captions, which those made from them have too."""
    made: dict[str, Any] = next(iter(build.get("provenance", [])), {})
    licence = made.get("corpus", {}).get("licence", UNKNOWN)
    return None if licence == UNKNOWN else str(licence)


def _of_manifest(url: str, build: dict[str, Any]) -> dict[str, Any]:
    """The settings that a collection was made with, as far as its manifest contains them."""
    try:
        made = build["provenance"][0]
        stages = {
            stage["name"]: stage["fields"]
            for step in made["steps"].values()
            for stage in step["identity"].get("stages", [])
        }
        settings = {name: stages[name] for name in ("extract_nouns", "synthesize", "embed")}
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(
            f"the manifest of {url} does not say how images are generated for it: name a "
            "configuration with --config"
        ) from error
    return settings | {"reduce": build["reduce"]["fields"]}


def _config(
    grow: Grow, asked: dict[str, Any], settings: dict[str, Any], output: str
) -> BuildConfig:
    """The build of the new captions with the settings of the old one."""
    for text in grow.overrides:
        if (name := text.partition("=")[0]) in ARGUMENTS:
            raise ConfigError(f"{text!r}: {name} is given by {ARGUMENTS[name]}")
    if not settings.get("synthesize"):
        raise InputError(
            f"{grow.place} was not built from generated images, and captions alone have no others: "
            "name with --config a configuration that generates them and embeds them in the same way"
        )
    tree = {name: settings[name] for name in KEPT if name in settings}
    nouns = dict(settings.get("extract_nouns") or {})
    given = {name for names in asked["classes"] for name in names}
    before = [names for names in nouns.get("classes", ()) if given.isdisjoint(names)]
    tree["extract_nouns"] = nouns | {"classes": asked["classes"] + before, "source": "text"}
    licence = (settings.get("corpus") or {}).get("licence")
    tree |= {
        "output": output,
        "base": asked["collection"],
        "corpus": {
            "path": f"{output}/{CAPTIONS}", "format": "text", "licence": licence,
            # Not the keys, and so not the images, of an earlier growth with the same captions.
            "corpus_id": f"grow_{fingerprint([output, asked])[:12]}",
        },
    }  # fmt: skip
    config = load_tree(BuildConfig, tree, f"the settings of {grow.place}", grow.overrides)
    if FOLDER in settings:
        parts = {name: getattr(config, name) for name in ("extract_nouns", "synthesize", "embed")}
        config = dataclasses.replace(config, **{
            name: with_absolute_models(part, settings[FOLDER]) for name, part in parts.items()
        })  # fmt: skip
    return with_absolute_places(config)


def _resumed(output: Store, asked: dict[str, Any], classes: Classes, config: BuildConfig) -> Plan:
    """The plan that an earlier run has written."""
    try:
        found = json.loads(output.read(GROWN))
        before = tuple(_row(row) for row in found["before"])
        captions = tuple((text, name, source) for text, name, source in found["captions"])
        earlier = found["asked"]
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{output.url}/{GROWN} is damaged: {error!r}") from error
    if different := changes(earlier, asked):
        raise MismatchError(
            f"{output.url} is of another growth: {'; '.join(different)}; choose another output"
        )
    return Plan(asked=asked, classes=classes, before=before, captions=captions, config=config)


def _row(tree: dict[str, Any]) -> ClassCoverage:
    lists = {name: tuple(tree[name]) for name in ("others", "synonyms")}
    return ClassCoverage(**tree | lists | {"clip": None})


def _json(plan: Plan, after: Sequence[ClassCoverage] | None) -> bytes:
    found = {
        "asked": plan.asked,
        "before": [asdict(row) for row in plan.before],
        "after": None if after is None else [asdict(row) for row in after],
        "captions": [list(caption) for caption in plan.captions],
    }
    return (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode()


def plan_text(plan: Plan) -> str:
    """What is missing and what will be built for it, for people."""
    target = plan.asked["target"]
    if not plan.weak:
        return f"each of the {len(plan.before)} classes has {target} references or more"
    by_class: dict[str, list[tuple[str, str]]] = {}
    for text, name, source in plan.captions:
        by_class.setdefault(name, []).append((text, source))
    lines = [
        f"{len(plan.weak)} of {len(plan.before)} classes have fewer than {target} references; "
        f"{len(plan.captions)} captions for them:"
    ]
    for row in plan.weak:
        written = by_class.get(row.name, [])
        counts = Counter(source for _, source in written)
        sources = ", ".join(f"{count} {SAID[source]}" for source, count in counts.items())
        lines.append(
            f"  {row.name}: has {row.own}, {len(written)} captions ({sources or 'none found'})"
            + (f", such as {written[0][0]!r}" if written else "")
        )
        wanted = _wanted(target, row.own, plan.config.corpus.draws)
        if len(written) < wanted:
            lines.append(
                f"    {wanted} would be needed: give more by --templates or --captions, or draw "
                "each several times (corpus.draws=3)"
            )
    published = output_of(plan.config).collection.url
    lines.append(f"output: {plan.config.output}; collection: {published}")
    return "\n".join(lines)
