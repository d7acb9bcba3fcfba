import json
from itertools import islice

import pytest

from ovref.contract import Dropped
from ovref.corpora import CorpusSpec, identify, read_captions
from ovref.corpora.mixture import interleaved, licences_of_corpus
from ovref.corpora.spec import LabelSpec
from ovref.errors import InputError
from ovref.identity import record_key


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "few.txt").write_text("".join(f"a few {n}\n" for n in range(4)))
    (tmp_path / "many.jsonl").write_text(
        "".join(json.dumps({"TEXT": f"many {n}"}) + "\n" for n in range(20))
    )
    return tmp_path


def mixture(folder, text, **settings):
    (folder / "both.yaml").write_text(text)
    return CorpusSpec(path=str(folder / "both.yaml"), **settings)


BOTH = """corpora:
  - {path: few.txt, licence: CC-BY-4.0}
  - {path: many.jsonl, weight: 3, caption_column: TEXT, licence: MIT}
"""


def test_captions_come_in_the_proportion_of_the_weights_until_a_corpus_ends(folder):
    found = [caption.text for caption in read_captions(mixture(folder, BOTH))]
    assert len(found) == len(set(found)) == 24
    for taken in (4, 8, 12, 16):
        assert sum(text.startswith("many") for text in found[:taken]) == 3 * taken // 4
    assert all(text.startswith("many") for text in found[16:])
    # Each corpus is in its own order, and its keys are those that it has alone.
    assert [text for text in found if text.startswith("a few")] == [f"a few {n}" for n in range(4)]
    keys = {caption.key for caption in read_captions(mixture(folder, BOTH))}
    assert record_key("few", "a few 0", 0, None) in keys
    assert record_key("many", "many 19", 0, None) in keys


def test_limits_are_of_each_corpus_and_of_the_whole(folder):
    text = BOTH.replace("few.txt,", "few.txt, limit: 1,")
    assert sum(1 for _ in read_captions(mixture(folder, text))) == 21
    spec = mixture(folder, BOTH, limit=8, draws=2)
    found = list(read_captions(spec))
    assert len(found) == 16 and {caption.draw for caption in found} == {0, 1}
    assert sum(caption.text.startswith("a few") for caption in found) == 4


def test_drops_take_no_turn(folder):
    (folder / "few.txt").write_text("\n" + "\x07\n" * 5 + "a cat\n")
    found = list(islice(read_captions(mixture(folder, BOTH)), 12))
    assert sum(isinstance(one, Dropped) for one in found) >= 5
    texts = [one.text for one in found if not isinstance(one, Dropped)]
    assert texts.index("a cat") <= 3


def test_the_identity_is_that_of_the_corpora_and_not_of_the_list(folder):
    first = identify(mixture(folder, BOTH))
    assert identify(mixture(folder, "# a comment\n" + BOTH)) == first
    assert identify(mixture(folder, BOTH.replace("weight: 3", "weight: 4"))) != first
    assert first["corpora"][1]["caption_column"] == "TEXT" and first["corpus_id"] == "both"
    (folder / "few.txt").write_text("another caption\n")
    assert identify(mixture(folder, BOTH)) != first


def test_licences_are_those_of_all(folder):
    assert licences_of_corpus(mixture(folder, BOTH)) == ("CC-BY-4.0", "MIT")
    assert licences_of_corpus(mixture(folder, BOTH, licence="mine")) == ("mine",)
    assert licences_of_corpus(CorpusSpec(path="nowhere.txt")) == ()
    one = BOTH.replace(", licence: MIT", "")
    assert licences_of_corpus(mixture(folder, one)) == ("CC-BY-4.0", "unknown")
    none = one.replace(", licence: CC-BY-4.0", "")
    assert licences_of_corpus(mixture(folder, none)) == ()


@pytest.mark.parametrize("setting", ["images", "caption_column", "image_column", "corpus_id"])
def test_what_each_corpus_has_of_its_own_is_not_set_for_all(folder, setting):
    with pytest.raises(InputError, match=f"{setting} is set for each corpus"):
        list(read_captions(mixture(folder, BOTH, **{setting: "x"})))


def test_what_a_listed_corpus_cannot_have_names_it(folder):
    text = "corpora: [{path: few.txt, format: text}]\n"
    with pytest.raises(InputError, match=r"both.yaml, corpus few.txt: repeats is for COCO"):
        list(read_captions(mixture(folder, text, repeats=True)))
    with pytest.raises(ValueError, match="a list of corpora has no labels"):
        mixture(folder, BOTH, labels=LabelSpec())


def test_all_streams_are_closed_with_the_mixture():
    closed = []

    def stream(name):
        try:
            yield from range(5)
        finally:
            closed.append(name)

    mixed = interleaved([stream("a"), stream("b")], [1, 1])
    assert [next(mixed), next(mixed)] == [0, 0]
    mixed.close()
    assert sorted(closed) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("corpora: []\n", "lists no corpus"),
        ("- few.txt\n", "must hold a list of `corpora`"),
        ("corpora: [{path: few.txt, weight: 0}]\n", "weight must be in"),
        ("corpora: [{path: few.txt, draws: 2}]\n", "draws is set for the whole"),
        ("corpora: [{path: both.yaml}]\n", "must not be a list itself"),
        ("corpora: [{path: few.txt, wieght: 2}]\n", "wieght"),
        ("corpora: {\n", "cannot read the corpora"),
    ],
)
def test_bad_lists_are_refused(folder, text, message):
    with pytest.raises(InputError, match=message):
        list(read_captions(mixture(folder, text)))


def test_a_list_that_is_missing_is_named(folder):
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        list(read_captions(CorpusSpec(path=str(folder / "nowhere.yaml"))))
