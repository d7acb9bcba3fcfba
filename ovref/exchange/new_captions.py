"""Captions for classes that a collection has too few references of.

They come from a user's own captions, from templates, and from the captions of the collection's
references with a near noun exchanged for the class (`a red boat on the water`: `a red canoe on the
water`). Only captions in which the build itself will find the class are taken.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, Literal

import numpy as np

from ovref.class_files import lines_of_file
from ovref.contract import Dropped
from ovref.errors import InputError
from ovref.identity import normalised
from ovref.records import Caption, Prompt
from ovref.stages.extract_nouns import ExtractNouns
from ovref_inference.collection.reference_collection import ReferenceCollection

TEMPLATES = (
    "a photo of the {}", "a picture of the {}", "a close-up photo of the {}",
    "a bright photo of the {}", "a dark photo of the {}", "a photo of the large {}",
    "a photo of the small {}", "a blurry photo of the {}", "a sharp photo of the {}",
    "a photo of the old {}", "a photo of the new {}", "a cropped photo of the {}",
    "a photo of the {} from above", "a photo of the {} from below", "a snapshot of the {}",
    "a view of the {}", "a photo of the colorful {}", "a photo of the beautiful {}",
    "the {} outside", "the {} inside", "the {} in daylight", "the {} at night",
    "the {} in the background", "the {} in the foreground",
)  # fmt: skip
"""With the article `the`, which is right for things, stuff and plurals; no other noun is in them
that would become references."""

NEAR_NOUNS = 5
"""Nouns nearest to a class in text space, whose captions are taken for it."""
CANDIDATES = 3
"""Captions written for each that is wanted: in some the class is not found as a noun."""
_ROWS_OF_A_NOUN = 2000

Source = Literal["file", "template", "exchanged"]


@dataclass(frozen=True, kw_only=True)
class NewCaption:
    """A caption that was written for a class."""

    text: str
    name: str
    """The class."""
    source: Source


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Captions that are wanted for one class."""

    names: tuple[str, ...]
    """The class and its synonyms."""
    captions: int


def read_templates(path: str) -> tuple[str, ...]:
    """The templates of a text file, one a line, each with one `{}` for the class.

    Raises:
        InputError: the file cannot be read, holds no template, or one without `{}` or with two.
    """
    found = tuple(
        text for line in lines_of_file(path, "templates") if (text := normalised(line))
    )
    bad = [text for text in found if text.count("{}") != 1]
    if bad or not found:
        raise InputError(
            f"{path} must hold templates, one a line, each with one {{}} for the class, found "
            + (repr(bad[0]) if bad else "none")
        )
    return found


def new_captions(
    collection: ReferenceCollection,
    wanted: Sequence[Wanted],
    nouns: ExtractNouns,
    *,
    templates: Sequence[str] = TEMPLATES,
    given: Iterable[Caption | Dropped] = (),
) -> list[NewCaption]:
    """Captions for each class, all different, at most as many as it wants.

    A class first takes those of `given` that name it, then exchanged ones and templates in turn.

    Args:
        collection: whose captions are taken for others. Its text encoder says which nouns are near,
            and is loaded where a class is not among its nouns.
        wanted: the classes.
        nouns: the stage that the captions will go through; its `classes` hold these.
        templates: each with one `{}`.
        given: captions of the user.

    Raises:
        ModelError: the tagger or the text encoder cannot be loaded.
        InputError: two classes are one to captions.
    """
    if not wanted:
        return []
    stage = nouns.build()
    of_user = _of_user(stage, wanted, given)
    found: list[NewCaption] = []
    for one, neighbours in zip(wanted, _near_nouns(collection, wanted), strict=True):
        candidates = of_user[one.names[0]]
        for text, source in _in_turn(
            ((text, "exchanged") for text in exchanged(collection, neighbours, one.names)),
            ((text, "template") for text in _filled(templates, one.names)),
        ):
            if len(candidates) >= CANDIDATES * one.captions:
                break
            candidates.setdefault(text, source)
        found += _accepted(stage, one, candidates)
    return found


def exchanged(
    collection: ReferenceCollection, neighbours: Sequence[str], names: Sequence[str]
) -> Iterator[str]:
    """The captions of these nouns' references with the noun exchanged for one of the class's names,
    which take turns, as the nouns do.

    Only nouns in the singular are exchanged, and no caption that names the class already.
    """
    there = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")s?\b", re.IGNORECASE)
    number = 0
    for rows in zip_longest(*(_captions_of(collection, noun) for noun in neighbours)):
        for row in filter(None, rows):
            if there.search(row["caption"]):
                continue
            start, end = row["span_start"], row["span_end"]
            name = names[number % len(names)]
            before = with_article(row["caption"][:start], name)
            yield normalised(before + name + row["caption"][end:])
            number += 1


def with_article(before: str, word: str) -> str:
    """The words before `word`, an indefinite article at their end as the word takes it."""
    found = re.search(r"(?i)\b(an?)(\s+)$", before)
    if found is None:
        return before
    vowel = re.match(r"(?i)(?!uni|eu|one\b|use|ute)[aeiou]|hour|honest|heir", word)
    article = found[1][0] + ("n" if vowel else "")
    return before[: found.start(1)] + article + found[2]


def _of_user(
    stage: Any, wanted: Sequence[Wanted], given: Iterable[Caption | Dropped]
) -> dict[str, dict[str, Source]]:
    """For each class the given captions that name it, until every class has as many as it wants."""
    found: dict[str, dict[str, Source]] = {one.names[0]: {} for one in wanted}
    missing = {_noun(one): one for one in wanted}
    for prompt in stage(item for item in given if isinstance(item, Caption)):
        if isinstance(prompt, Prompt):
            for one in {noun.text: missing[noun.text] for noun in prompt.nouns
                        if noun.text in missing}.values():  # fmt: skip
                texts = found[one.names[0]]
                texts[prompt.caption] = "file"
                if len(texts) == one.captions:
                    del missing[_noun(one)]
        if not missing:
            break
    return found


def _noun(one: Wanted) -> str:
    """What the class is called as a noun."""
    return normalised(one.names[0]).lower()


def _captions_of(collection: ReferenceCollection, noun: str) -> Iterator[Mapping[str, Any]]:
    """Rows of the noun's references whose captions have it in the singular, each caption once."""
    seen = set()
    for row in collection.rows(collection.references_of(noun)[:_ROWS_OF_A_NOUN]):
        said, after = row["caption"][row["span_start"] : row["span_end"]], row["span_end"]
        plural = row["caption"][after : after + 1].isalpha()  # of spans found in others' captions
        if said.lower() == noun and not plural and row["caption"] not in seen:
            seen.add(row["caption"])
            yield row


def _near_nouns(collection: ReferenceCollection, wanted: Sequence[Wanted]) -> list[list[str]]:
    """For each class the nouns nearest in text space that are none of its names."""
    nouns = np.array(collection.nouns)
    present = np.flatnonzero(collection.noun_counts > 0)
    if not len(present):
        return [[] for _ in wanted]
    row = {name: at for at, name in enumerate(collection.nouns)}
    texts_cd = np.stack([
        collection.noun_embeddings[row[name]] if name in row else collection.embed_text([name])[0]
        for name in map(_noun, wanted)
    ])  # fmt: skip
    cosines_cv = texts_cd @ collection.noun_embeddings[present].T
    found = []
    for one, cosines_v in zip(wanted, cosines_cv, strict=True):
        own = {normalised(name).lower() for name in one.names}
        ranked = nouns[present[np.argsort(-cosines_v, kind="stable")]].tolist()
        found.append([noun for noun in ranked if noun not in own][:NEAR_NOUNS])
    return found


def _filled(templates: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    """Every template with every name, all templates with the first name first."""
    for name in names:
        for template in templates:
            before, _, after = template.partition("{}")
            yield with_article(before, name) + name + after


def _in_turn(*sources: Iterator[tuple[str, Source]]) -> Iterator[tuple[str, Source]]:
    return filter(None, chain.from_iterable(zip_longest(*sources)))


def _accepted(stage: Any, one: Wanted, candidates: Mapping[str, Source]) -> list[NewCaption]:
    """The first candidates in which the stage finds the class."""
    captions = (Caption(key=text, text=text, source="new") for text in candidates)
    own = _noun(one)
    found = [
        NewCaption(text=answer.caption, name=one.names[0], source=candidates[answer.caption])
        for answer in stage(captions)
        if isinstance(answer, Prompt) and any(noun.text == own for noun in answer.nouns)
    ]
    return found[: one.captions]
