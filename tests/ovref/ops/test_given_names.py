"""Names of classes in captions, against spaCy's matcher and against every span."""

import random

import pytest
import spacy
from spacy.matcher import PhraseMatcher
from spacy.tokens import Doc
from spacy.util import filter_spans

from ovref.errors import InputError
from ovref.ops.given_names import given_names, mentions
from ovref.ops.words import words_of

BLANK = spacy.blank("en")
WORDS = ["red", "garlic", "press", "petri", "dish", "hot", "dog", "of", "man"]


def random_classes(rng):
    names = {" ".join(rng.choices(WORDS, k=rng.randrange(1, 4))) for _ in range(12)}
    return [(name,) for name in sorted(names)]


def apart(found):
    taken, kept = set(), []
    for one in found:
        if taken.isdisjoint(range(one.start, one.end)):
            taken.update(range(one.start, one.end))
            kept.append((one.start, one.end, one.text))
    return sorted(kept)


def test_the_longest_names_are_those_of_spacy():
    rng = random.Random(0)
    for _ in range(200):
        classes = random_classes(rng)
        matcher = PhraseMatcher(BLANK.vocab, attr="LOWER")
        for (name,) in classes:
            matcher.add(name, [BLANK.make_doc(name)])
        caption = BLANK.make_doc(" ".join(rng.choices([*WORDS, "Dog", "GARLIC"], k=12)))
        expected = [
            (span.start, span.end, span.label_)
            for span in filter_spans(matcher(caption, as_spans=True))
        ]
        found = mentions(words_of(caption), given_names(classes, BLANK.make_doc))
        assert apart(found) == expected


def test_plurals_and_case_are_those_of_every_span():
    rng = random.Random(1)
    plural = {"press": "Presses", "dish": "dishes", "dog": "dogs", "man": "men"}
    for _ in range(200):
        classes = random_classes(rng)
        said = rng.choices(WORDS, k=10)
        shown = [rng.choice([word, plural.get(word, word.upper())]) for word in said]
        found = mentions(words_of(Doc(BLANK.vocab, shown)), given_names(classes, BLANK.make_doc))
        expected = [
            (start, end - start, name)
            for (name,) in classes
            for start in range(len(said))
            for end in range(start + 1, len(said) + 1)
            if " ".join(said[start:end]) == name
        ]
        assert sorted((one.start, one.size, one.text) for one in found) == sorted(expected)


def test_what_can_mean_nothing_else():
    given = given_names([("dog",), ("Thermomix",), ("t-shirt",), ("hot dog",)], BLANK.make_doc)
    words = words_of(BLANK.make_doc("two T-shirts, a hot dog and a THERMOMIX"))
    found = [(one.text, one.sure) for one in mentions(words, given)]
    assert found == [("hot dog", True), ("t-shirt", True), ("dog", False), ("thermomix", True)]


def test_synonyms_stand_for_the_first_name_and_belong_to_the_first_class():
    given = given_names([("Table", "desk"), ("bench", "desk")], BLANK.make_doc)
    assert given.classes == {("table",): "table", ("desk",): "table", ("bench",): "bench"}


@pytest.mark.parametrize("classes", [[("tree",), ("Trees",)], [("sofa", "couch"), ("couch",)]])
def test_two_classes_that_captions_cannot_tell_apart_are_refused(classes):
    with pytest.raises(InputError, match=f"'{classes[0][0]}' and '{classes[1][0].lower()}'"):
        given_names(classes, BLANK.make_doc)
