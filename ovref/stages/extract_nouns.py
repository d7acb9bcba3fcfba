"""Stage extract_nouns: captions in, prompts out.

A caption that is not in English is dropped (`other_language`), and one without nouns (`no_nouns`).
The labels of a labelled set are nouns as they are, without a tagger and in any language.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from ovref.class_files import list_of_file
from ovref.config import STRICT
from ovref.contract import Dropped
from ovref.identity import ADDED_LATER
from ovref.locations import absolute
from ovref.records import Caption, Noun, Prompt
from ovref_inference.ranges import require_at_least

CAPTIONS_PER_BATCH = 256
"""Does not change results, so it is not in the spec. Limits memory: a batch may hold images."""
MANY_OTHER_LANGUAGE = 0.05
"""Share of captions in another language above which the user is warned."""


def _classes(value: Any) -> Any:
    """What a configuration gives for classes: the content of the file, where it names one."""
    if isinstance(value, str):
        return list_of_file(absolute(value, "extract_nouns.classes")).classes
    if isinstance(value, list):  # of JSON
        return tuple(tuple(names) if isinstance(names, list) else names for names in value)
    return value


ClassNames = Annotated[tuple[tuple[str, ...], ...], BeforeValidator(_classes)]


@dataclass(frozen=True, kw_only=True)
class ExtractNouns:
    """Finds the nouns of each caption with a part-of-speech tagger. See `ops.noun_extraction`."""

    __pydantic_config__ = STRICT

    name: ClassVar[str] = "extract_nouns"
    version: ClassVar[int] = 3
    """Also increased when the bundled tagger or the word lists change."""

    tagger: str = "miniature:tagger"
    """`miniature:tagger` of the package `ovref_miniature`, an installed spaCy package such as
    `en_core_web_sm`, or a folder."""
    tagger_version: str | None = None
    """Required version of the spaCy package, such as `3.8.0`; None accepts any. Set it for builds
    that are resumed on other machines: another version finds other nouns."""
    include_proper: bool = True
    """Include names of things, each as one noun: `eiffel tower`, `porsche 356`, `frisbee`. Names of
    the whole scene (`in Tokyo`), of authors and on signs are excluded."""
    compounds: bool = True
    """Join adjacent nouns to one: `brick wall`."""
    stop_nouns: tuple[str, ...] = ()
    """Additional singular, lower-case nouns to exclude, besides the built-in ones."""
    max_nouns: int | None = None
    """Maximum number of nouns per caption; the first are kept. None keeps all."""
    source: Literal["text", "tags", "labels"] = field(default="text", metadata=ADDED_LATER)
    """Where nouns are found. `text`: in the captions, by the rules of `ops.noun_extraction`.
    `tags`: every word that the tagger takes for a common noun, as in FOSSIL and VOCSeg: colours,
    views, measures and words after `no` count; `include_proper` and `compounds` do not matter, and
    `stop_nouns` are your own alone. `labels`: those of a labelled set (`corpus.labels`); the tagger
    is not loaded, and its settings do not matter."""
    classes: ClassNames = field(default=(), metadata=ADDED_LATER)
    """A text file of classes whose names go before the tagger's nouns, the longest first: one class
    a line, its synonyms after `;`. A noun is then the first name of its class; other nouns of the
    caption are kept. The names themselves become the setting, so that another content of the file
    is another setting, and no worker needs the file. In Python: the names of each class, such as
    `list_of_file(path).classes`."""

    def __post_init__(self) -> None:
        if not self.tagger:
            raise ValueError("tagger must name a spaCy pipeline, found an empty string")
        if self.max_nouns is not None:
            require_at_least("max_nouns", self.max_nouns, 1)
        if self.source == "labels" and (
            self.stop_nouns or self.classes or self.max_nouns is not None
        ):
            raise ValueError(
                "with source=labels every label is a noun: leave out stop_nouns, classes and "
                "max_nouns"
            )
        if self.source == "tags" and self.classes:
            raise ValueError("with source=tags no class goes before a noun: leave out classes")
        for names in self.classes:
            if isinstance(names, str) or not names or not all(map(str.strip, names)):
                raise ValueError(
                    "classes must be the names of each class, as list_of_file(path).classes gives "
                    f"them, found {names!r} for one"
                )
        for noun in self.stop_nouns:
            if noun != noun.lower().strip() or not noun:
                raise ValueError(
                    f"stop_nouns must be lower-case and without outer blanks, found {noun!r}"
                )

    def build(self) -> Callable[[Iterator[Caption]], Iterator[Prompt | Dropped]]:
        """Loads the tagger, if nouns are found in text. Raises ModelError when it cannot,
        and InputError if two classes cannot be told apart in captions."""
        if self.source == "labels":
            return _labels_as_nouns
        from ovref.models.tagger import load_tagger
        from ovref.ops.given_names import given_names
        from ovref.ops.language import is_other_language
        from ovref.ops.noun_extraction import nouns_of, tagged_nouns, tagger_text
        from ovref.ops.word_lists import STOP_NOUNS

        nlp = load_tagger(self.tagger, self.tagger_version)
        given = given_names(self.classes, nlp.make_doc) if self.classes else None
        find: Callable[[Any], tuple[Noun, ...]]
        if self.source == "tags":
            find = partial(tagged_nouns, stop_nouns=set(self.stop_nouns), max_nouns=self.max_nouns)
        else:
            find = partial(
                nouns_of,
                include_proper=self.include_proper,
                compounds=self.compounds,
                stop_nouns=STOP_NOUNS | set(self.stop_nouns),
                max_nouns=self.max_nouns,
                given=given,
            )

        def nouns_of_batch(texts: list[str]) -> list[tuple[Noun, ...]]:
            # spaCy caches every word; a memory zone drops them again, so that the memory of an
            # actor does not grow with the corpus.
            with nlp.memory_zone():
                docs = nlp.pipe(map(tagger_text, texts), batch_size=CAPTIONS_PER_BATCH)
                return [find(doc) for doc in docs]

        def stage(records: Iterator[Caption]) -> Iterator[Prompt | Dropped]:
            records = iter(records)
            while batch := list(islice(records, CAPTIONS_PER_BATCH)):
                found = nouns_of_batch([record.text for record in batch])
                for record, nouns in zip(batch, found, strict=True):
                    if is_other_language(record.text):
                        yield Dropped(record.key, "other_language")
                    else:
                        yield _answer(record, nouns)

        return stage

    def check(self) -> list[Prompt | Dropped]:
        """Tags one caption; see `ovref.check_models`."""
        if self.source == "labels":
            return []
        return list(self.build()(iter([Caption(key="blank", text="a thing", source="blank")])))


def language_warning(captions: int, dropped: dict[str, int]) -> str | None:
    """A warning for the user if many captions are not in English, otherwise None.

    Args:
        captions: number of captions processed.
        dropped: number of dropped captions, by reason.
    """
    others = dropped.get("other_language", 0)
    if others <= MANY_OTHER_LANGUAGE * captions:
        return None
    return (
        f"warning: {others} of {captions} captions ({others / captions:.0%}) are not in English "
        f"and were dropped (other_language): nouns are found in English captions only; translate "
        f"them, or leave those files out"
    )


def _labels_as_nouns(records: Iterator[Caption]) -> Iterator[Prompt | Dropped]:
    return (_answer(record, record.labels) for record in records)


def _answer(record: Caption, nouns: tuple[Noun, ...]) -> Prompt | Dropped:
    if not nouns:
        return Dropped(record.key, "no_nouns")
    return Prompt(
        key=record.key,
        caption=record.text,
        nouns=nouns,
        source=record.source,
        draw=record.draw,
        image=record.image,
        segments=record.segments,
    )
