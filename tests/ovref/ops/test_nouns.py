import json
import random
from pathlib import Path

import pytest
import spacy
from spacy.tokens import Doc

from ovref.corpora import CorpusSpec, read_captions
from ovref.ops.nouns import nouns_of, singular, tagger_text
from ovref.ops.word_lists import COLOURS, COMPOUNDS, INVARIANT, IRREGULAR, STOP_NOUNS
from ovref.records import Caption
from ovref.stages.extract_nouns import ExtractNouns

BLANK = spacy.blank("en")
DATA = Path(__file__).parents[4] / "shared" / "data"


def doc(tagged: str) -> Doc:
    """`a/DT man/NN` as a tagged Doc; `_` before a word says that no blank stands before it."""
    words, spaces, tags = [], [], []
    for part in tagged.split():
        word, _, tag = part.rpartition("/")
        if word.startswith("_"):
            spaces[-1] = False
        words.append(word.removeprefix("_"))
        tags.append(tag)
        spaces.append(True)
    return Doc(BLANK.vocab, words=words, spaces=spaces, tags=tags)


def texts(tagged: str, **options) -> list[str]:
    return [noun.text for noun in nouns_of(doc(tagged), **options)]


# -- spans --------------------------------------------------------------------------------------


def test_nouns_are_singular_and_lower_case_with_the_span_of_what_the_caption_says():
    tagged = doc("Two/CD Men/NNS walk/VBP Dogs/NNS near/IN a/DT Brick/NN Wall/NN ./.")
    found = nouns_of(tagged)
    assert [(noun.text, tagged.text[noun.start : noun.end]) for noun in found] == [
        ("man", "Men"),
        ("dog", "Dogs"),
        ("brick wall", "Brick Wall"),
    ]


def test_a_noun_said_twice_counts_once_where_it_is_said_first():
    found = nouns_of(doc("a/DT dog/NN and/CC two/CD dogs/NNS and/CC a/DT cat/NN"))
    assert [(noun.text, noun.start) for noun in found] == [("dog", 2), ("cat", 25)]


def test_spans_hold_on_any_tags_and_spaces():
    """Of random tags: spans lie in the text, in order, apart, and spell the noun's words."""
    rng = random.Random(0)
    words = "a man brick walls t - shirt orange dogs photo running left of group , 2 é"
    tags = ["NN", "NNS", "JJ", "DT", "IN", "VBG", "CD", "HYPH", "NNP"]
    for _ in range(500):
        chosen = [rng.choice([*words.split(), "  "]) for _ in range(rng.randrange(1, 12))]
        spaces = [rng.random() < 0.8 for _ in chosen]
        tagged = Doc(BLANK.vocab, chosen, spaces, tags=[rng.choice(tags) for _ in chosen])
        found = nouns_of(tagged, include_proper=rng.random() < 0.5)
        end = 0
        for noun in found:
            assert end <= noun.start < noun.end <= len(tagged.text)
            end = noun.end
            *first, last = noun.text.split()
            said = "".join(tagged.text[noun.start : noun.end].lower().split())
            assert said.startswith("".join(first))
            assert said[len("".join(first)) :].startswith(last[:2])
            assert noun.text not in STOP_NOUNS
        assert len({noun.text for noun in found}) == len(found)


def test_nothing_in_nothing_out():
    assert nouns_of(BLANK("")) == ()
    assert nouns_of(BLANK("   ")) == ()
    assert nouns_of(BLANK("no tags at all")) == ()


def test_max_nouns_keeps_the_first():
    tagged = "dog/NN and/CC cat/NN and/CC bird/NN"
    assert texts(tagged, max_nouns=2) == ["dog", "cat"]
    assert texts(tagged, max_nouns=9) == texts(tagged) == ["dog", "cat", "bird"]


# -- which words --------------------------------------------------------------------------------


def test_only_common_nouns_unless_proper_ones_are_wanted():
    tagged = "a/DT red/JJ Boeing/NNP flies/VBZ over/IN London/NNP with/IN pilots/NNS"
    assert texts(tagged) == ["pilot"]
    assert texts(tagged, include_proper=True) == ["boeing", "london", "pilot"]


@pytest.mark.parametrize("word", ["left", "right", "middle", "photo", "group", "front", "view"])
def test_views_positions_and_quantities_are_no_nouns(word):
    assert texts(f"the/DT {word}/NN of/IN a/DT dog/NN") == ["dog"]


def test_plural_stop_nouns_are_stopped_too():
    assert texts("different/JJ types/NNS of/IN food/NN and/CC photos/NNS") == ["food"]


def test_stop_nouns_can_be_chosen():
    assert texts("a/DT dog/NN in/IN a/DT photo/NN", stop_nouns={"dog"}) == ["photo"]
    assert texts("a/DT brick/NN wall/NN", stop_nouns={"brick wall"}) == []


@pytest.mark.parametrize("colour", sorted(COLOURS))
def test_colours_are_never_nouns(colour):
    assert texts(f"a/DT {colour}/NN car/NN") == ["car"]
    assert texts(f"dressed/VBN in/IN {colour}/NN") == []


@pytest.mark.parametrize(
    ("tagged", "expected"),
    [
        ("an/DT orange/NN on/IN a/DT plate/NN", ["orange", "plate"]),
        ("an/DT orange/NN ,/, some/DT grapes/NNS", ["orange", "grape"]),
        ("four/CD oranges/NNS", ["orange"]),
        ("an/DT orange/NN cat/NN", ["cat"]),
        ("an/DT orange/NN and/CC white/JJ cat/NN", ["cat"]),
        ("an/DT orange/NN traffic/NN cone/NN", ["traffic cone"]),
        ("painted/VBN bright/JJ orange/NN", ["orange"]),  # known to go wrong
        ("black/JJ and/CC orange/NN", []),
        ("orange/NN", []),
        ("an/DT orange/NN", ["orange"]),
        ("an/DT orange/JJ and/CC a/DT fork/NN", ["orange", "fork"]),
        ("an/DT orange/JJ couch/NN", ["couch"]),
    ],
)
def test_an_orange_is_a_fruit_or_a_colour(tagged, expected):
    assert texts(tagged) == expected


@pytest.mark.parametrize("word", ["x", "2", "3d", "[", "'s", "http://x.y", "#1"])
def test_what_is_no_word_of_letters_is_no_noun(word):
    assert texts(f"{word}/NN dog/NN") == ["dog"]


def test_a_couple_of_people_is_no_couple():
    assert texts("a/DT couple/NN of/IN people/NNS") == ["person"]
    assert texts("a/DT couple/NN on/IN a/DT bench/NN") == ["couple", "bench"]


@pytest.mark.parametrize(
    ("tagged", "expected"),
    [
        ("a/DT dish/NN sits/NNS on/IN it/PRP", ["dish"]),
        ("a/DT tall/JJ man/NN rides/NNS a/DT horse/NN", ["man", "horse"]),
        ("the/DT kitchen/NN cabinets/NNS", ["kitchen cabinet"]),
        ("a/DT small/JJ waves/NNS", ["wave"]),
        ("a/DT man/NN with/IN dogs/NNS", ["man", "dog"]),
        ("a/DT kitchen/NN scissors/NNS", ["kitchen scissors"]),
        ("a/DT lady/NN cutting/NN pizza/NN", ["lady", "pizza"]),
        ("a/DT building/NN entrance/NN", ["building entrance"]),
        ("a/DT painting/NN on/IN a/DT wall/NN", ["painting", "wall"]),
    ],
)
def test_verbs_that_taggers_take_for_nouns(tagged, expected):
    assert texts(tagged) == expected


# -- compounds ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tagged", "expected"),
    [
        ("a/DT fire/NN hydrant/NN", ["fire hydrant"]),
        ("two/CD traffic/NN lights/NNS", ["traffic light"]),
        ("a/DT stainless/JJ steel/NN sink/NN", ["stainless steel", "sink"]),
        ("a/DT kitchen/NN counter/NN sink/NN", ["kitchen counter sink"]),
        ("one/CD two/NN three/NN four/NN five/NN", ["two", "three four five"]),
        ("a/DT man/NN skateboard/NN", ["man", "skateboard"]),
        ("people/NNS kites/NNS", ["person", "kite"]),
        ("sports/NNS ball/NN", ["sports ball"]),
        ("a/DT front/NN door/NN", ["door"]),
        ("a/DT beach/NN area/NN", ["beach"]),
        ("a/DT tennis/NN match/NN", []),
        ("a/DT dining/VBG table/NN", ["dining table"]),
        ("dining/VBG tables/NNS", ["dining table"]),
        ("a/DT hot/JJ dog/NN", ["hot dog"]),
        ("a/DT parking/NN lot/NN", ["parking lot"]),
        ("a/DT city/NN parking/NN lot/NN", ["city", "parking lot"]),
        ("a/DT lot/NN of/IN dogs/NNS", ["dog"]),
        ("an/DT orange/NN juice/NN", ["orange juice"]),
        ("a/DT red/JJ double/JJ decker/NN bus/NN", ["double decker bus"]),
        ("hot/JJ dog/VB", []),
        ("a/DT dog/NN ,/, cat/NN", ["dog", "cat"]),
    ],
)
def test_compounds(tagged, expected):
    assert texts(tagged) == expected


def test_without_compounds_each_word_is_a_noun():
    assert texts("a/DT brick/NN wall/NN", compounds=False) == ["brick", "wall"]
    assert texts("a/DT dining/VBG table/NN", compounds=False) == ["table"]


def test_words_tied_by_hyphens_are_one_word():
    assert texts("a/DT t/NN _-/HYPH _shirt/NN") == ["t-shirt"]
    assert texts("two/CD t/NN _-/HYPH _shirts/NNS") == ["t-shirt"]
    assert texts("a/DT two/CD _-/HYPH _story/NN house/NN") == ["house"]
    assert texts("a/DT brown/JJ _-/HYPH _haired/VBN man/NN") == ["man"]
    assert texts("a/DT double/JJ _-/HYPH _decker/NN bus/NN") == ["double-decker bus"]
    assert texts("a/DT dog/NN -/: a/DT cat/NN") == ["dog", "cat"]


def test_blanks_between_the_words_of_a_compound_do_not_matter():
    found = nouns_of(Doc(BLANK.vocab, ["brick", "  ", "wall"], tags=["NN", "_SP", "NN"]))
    assert [(noun.text, noun.start, noun.end) for noun in found] == [("brick wall", 0, 13)]


def test_known_compounds_are_written_as_the_rules_read_them():
    for compound in COMPOUNDS:
        assert compound == compound.lower().strip()
        assert 2 <= len(compound.split()) <= 4
    assert len(set(COMPOUNDS)) == len(COMPOUNDS)


# -- singular -----------------------------------------------------------------------------------

PLURALS = """
dogs dog, cats cat, boxes box, buses bus, minibuses minibus, glasses glasses, dresses dress,
benches bench, watches watch, dishes dish, brushes brush, churches church, axes axe, foxes fox,
cities city, babies baby, puppies puppy, berries berry, cookies cookie, movies movie, ties tie,
monkeys monkey, trays tray, toys toy, keys key, men man, women woman, snowmen snowman,
firemen fireman, businesswomen businesswoman, children child, grandchildren grandchild,
people person, salespeople salesperson, feet foot, teeth tooth, geese goose, mice mouse,
knives knife, leaves leaf, shelves shelf, bookshelves bookshelf, loaves loaf, wolves wolf,
scarves scarf, calves calf, gloves glove, waves wave, stoves stove, olives olive, sleeves sleeve,
potatoes potato, tomatoes tomato, heroes hero, photos photo, pianos piano, kangaroos kangaroo,
shoes shoe, toes toe, canoes canoe, horseshoes horseshoe, horses horse, houses house, vases vase,
roses rose, noses nose, nurses nurse, purses purse, blouses blouse, greenhouses greenhouse,
lenses lens, cactuses cactus, cacti cactus, octopuses octopus, viruses virus, walruses walrus,
sizes size, mazes maze, prizes prize, quizzes quiz, bikes bike, planes plane, skies sky,
headaches headache, mustaches mustache, skis ski, taxis taxi, sheep sheep, deer deer, fish fish,
fishes fish, moose moose, aircraft aircraft, series series, pants pants, jeans jeans,
scissors scissors, sunglasses sunglasses, clothes clothes, stairs stairs, pajamas pajamas,
t-shirts t-shirt, x-rays x-ray, passers-by passer-by, zebras zebra, giraffes giraffe,
elephants elephant, bras bra, causes cause, couches couch, peaches peach, sandwiches sandwich,
wine-glasses wine-glasses, police-men police-man, specimens specimen
"""


@pytest.mark.parametrize("pair", PLURALS.replace("\n", " ").strip().split(", "))
def test_singulars(pair):
    plural, expected = pair.split()
    assert singular(plural) == expected


def test_singulars_that_end_in_s_stay():
    words = "bus gas lens canvas dress tennis cactus iris billiards pants".split()  # noqa: SIM905
    assert texts(" of/IN ".join(f"{word}/NN" for word in words)) == words


def test_a_plural_that_the_tagger_calls_singular_is_made_singular():
    assert texts("three/CD zebras/NN and/CC skis/NN and/CC x/NN _-/HYPH _rays/NN") == [
        "zebra",
        "ski",
        "x-ray",
    ]
    assert texts("a/DT dish/NN sits/NN on/IN it/PRP") == ["dish"]


def test_glasses_are_worn_or_drunk_from():
    assert texts("a/DT man/NN with/IN glasses/NNS") == ["man", "glasses"]
    assert texts("two/CD wine/NN glasses/NNS") == ["wine glass"]
    assert texts("two/CD glasses/NNS of/IN milk/NN") == ["glass", "milk"]
    assert texts("eye/NN glasses/NNS") == ["eye glasses"]


def test_short_and_odd_plurals_do_not_vanish():
    for plural in ["s", "as", "is", "us", "ies", "es", "-", "men", "ss", "ves"]:
        assert singular(plural)


def test_the_lists_do_not_contradict_each_other():
    assert not INVARIANT & IRREGULAR.keys()
    for word in INVARIANT:
        assert singular(word) == word
    assert all(word == word.lower() for word in STOP_NOUNS | COLOURS | INVARIANT)


# -- what the tagger sees -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "seen"),
    [
        ("A dog on a mat", "A dog on a mat"),
        ("A DOG ON A MAT", "a dog on a mat"),
        ("A Dog Sleeping On The Mat", "a dog sleeping on the mat"),
        ("A man walks in New York City", "A man walks in New York City"),
        ("Big Ben", "Big Ben"),
        ("", ""),
        ("\u0130stanbul \u0130s Nice", "\u0130stanbul \u0130s nice"),
    ],
)
def test_capitals_that_mean_nothing_are_taken_away(caption, seen):
    assert tagger_text(caption) == seen
    assert len(tagger_text(caption)) == len(caption)


# -- real captions ------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["looked_at", "held_out"])
def test_nouns_of_real_captions_agree_with_those_labelled_by_hand(part):
    """100 COCO captions, labelled by reading before the rules were run on them.

    Mistakes on those of `looked_at` have since led to changes of the rules; the others have not.
    The labels are keyed by annotation id; `tests/benchmarks/nouns.py` measures the same.
    """
    path = DATA / "coco" / "captions_val2017.json"
    if not path.exists():
        pytest.skip(f"no COCO captions at {path}")
    labels = json.loads((Path(__file__).parent / "data" / "coco_nouns.json").read_text())[part]
    captions = [
        record
        for record in read_captions(CorpusSpec(path=str(path)))
        if isinstance(record, Caption) and record.source.rpartition(" ")[2] in labels
    ]
    assert len(captions) == len(labels)
    found = right = expected = 0
    for caption, answer in zip(captions, ExtractNouns().build()(iter(captions)), strict=True):
        mine = {noun.text for noun in getattr(answer, "nouns", ())}
        gold = set(labels[caption.source.rpartition(" ")[2]])
        found, right, expected = found + len(mine), right + len(mine & gold), expected + len(gold)
    assert 2 * right / (found + expected) > 0.88
