"""Captions for weak classes: what they say, where they come from, and what is not taken."""

import numpy as np
import pytest

from array_fakes import EMBED, FakeTexts
from ovref.errors import InputError
from ovref.exchange.new_captions import (
    TEMPLATES,
    Wanted,
    exchanged,
    new_captions,
    read_templates,
    with_article,
)
from ovref.exchange.own_arrays import OwnArrays, collection_from_arrays
from ovref.records import Caption, Prompt
from ovref.stages.extract_nouns import ExtractNouns
from ovref_inference import ReferenceCollection

SAID = (
    ("boat", "a red boat on the water"),
    ("boat", "two boats on the water"),  # in the plural: nothing to exchange
    ("boat", "an old boat beside a canoe"),  # names the class already
    ("boat", "A boat."),
    ("horse", "a horse on the grass"),
    ("horse", "a horse on the grass"),
)


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new_captions") / "collection"
    arrays = OwnArrays(
        visual=np.random.default_rng(0).standard_normal((len(SAID), 8)),
        nouns=[noun for noun, _ in SAID],
        captions=[caption for _, caption in SAID],
    )
    collection_from_arrays(str(folder), arrays, EMBED, texts=FakeTexts())
    with ReferenceCollection.open(folder) as opened:
        opened._text_encoder = FakeTexts()
        yield opened


def nouns(*classes):
    return ExtractNouns(classes=tuple(classes))


def test_a_noun_is_exchanged_where_it_stands_in_the_singular(collection):
    found = list(exchanged(collection, ["boat", "horse"], ["canoe", "outrigger"]))
    assert found == [
        "a red canoe on the water",
        "an outrigger on the grass",
        "A canoe.",
    ]


@pytest.mark.parametrize(
    ("before", "word", "expected"),
    [
        ("a ", "owl", "an "), ("An ", "fish", "A "), ("a ", "unicorn", "a "),
        ("in an ", "cup", "in a "),
        ("a red ", "owl", "a red "), ("the ", "owl", "the "), ("banana ", "owl", "banana "),
    ],
)  # fmt: skip
def test_the_article_suits_the_word(before, word, expected):
    assert with_article(before, word) == expected


def test_every_template_names_the_class_and_nothing_else():
    stage = nouns(("petri dish",), ("zebra",)).build()
    texts = [template.format(name) for template in TEMPLATES for name in ("petri dish", "zebra")]
    answers = list(stage(Caption(key=text, text=text, source="x") for text in texts))
    for answer in answers:
        assert isinstance(answer, Prompt), answer
        assert [noun.text for noun in answer.nouns] in (["petri dish"], ["zebra"]), answer.caption
    assert len(answers) == 2 * len(set(TEMPLATES))


def test_own_captions_come_first_then_two_sources_in_turn(collection):
    given = [
        Caption(key=text, text=text, source="mine")
        for text in ("a dog", "two zebras at a zoo", "the canoe of a friend")
    ]
    wanted = [Wanted(names=("Zebra",), captions=4), Wanted(names=("canoe",), captions=30)]
    stage = nouns(("Zebra",), ("canoe",))
    found = new_captions(collection, wanted, stage, templates=("the {} here",), given=given)
    zebra = [(one.source, one.text) for one in found if one.name == "Zebra"]
    assert zebra[0] == ("file", "two zebras at a zoo")
    assert [source for source, _ in zebra[1:]] == ["exchanged", "template", "exchanged"]
    assert zebra[2][1] == "the Zebra here"
    canoe = [one.text for one in found if one.name == "canoe"]
    assert canoe[0] == "the canoe of a friend" and len(set(canoe)) == len(canoe) < 30
    assert new_captions(collection, [], stage) == []


def test_captions_in_which_the_class_is_no_noun_are_not_taken(collection):
    stage, wanted = nouns(("bark",)), [Wanted(names=("bark",), captions=5)]
    found = new_captions(
        collection, wanted, stage, templates=("dogs {} loudly", "no {} at all", "the {} of a tree")
    )
    assert "the bark of a tree" in {one.text for one in found}
    assert not {"no bark at all"} & {one.text for one in found}


def test_templates_are_checked(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("a {} here\n\n  the   {}\n")
    assert read_templates(str(path)) == ("a {} here", "the {}")
    for text, message in (("a thing\n", "'a thing'"), ("{} {}\n", "'{} {}'"), ("\n", "found none")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_templates(str(path))
    with pytest.raises(InputError, match="cannot read the templates"):
        read_templates(str(tmp_path / "missing.txt"))
