import json
import random
from pathlib import Path

import pytest
import spacy
from spacy.tokens import Doc

from ovref.corpora import CorpusSpec, read_captions
from ovref.ops.given_names import given_names
from ovref.ops.noun_extraction import nouns_of, tagged_nouns, tagger_text
from ovref.ops.singular import singular
from ovref.ops.word_lists import COLOURS, COMPOUNDS, INVARIANT, IRREGULAR, STOP_NOUNS
from ovref.records import Caption, Noun
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
    """With random tags, spans lie in the text, in order, apart, and spell the noun's words."""
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


def test_tagged_nouns_are_those_of_the_tagger_alone():
    tagged = doc(
        "no/DT two/CD lane/NN road/NN in/IN gray/NN ,/, t/NN _-/HYPH _shirts/NNS and/CC &/NN "
        "Paris/NNP photos/NNS of/IN a/DT dish/NN sits/NNS"
    )
    found = tagged_nouns(tagged)
    assert [(noun.text, tagged.text[noun.start : noun.end]) for noun in found] == [
        ("lane", "lane"), ("road", "road"), ("gray", "gray"), ("t-shirt", "t-shirts"),
        ("photo", "photos"), ("dish", "dish"), ("sit", "sits"),
    ]  # fmt: skip
    assert [one.text for one in tagged_nouns(tagged, stop_nouns={"lane"}, max_nouns=1)] == ["road"]
    assert texts("no/DT two/CD lane/NN road/NN in/IN gray/NN") == []
    (once,) = tagged_nouns(doc("dogs/NNS chase/VBP a/DT dog/NN"))
    assert once == Noun(text="dog", start=0, end=4)


# -- which words --------------------------------------------------------------------------------


def test_names_count_unless_they_are_not_wanted():
    tagged = "a/DT red/JJ Boeing/NNP flies/VBZ over/IN London/NNP with/IN pilots/NNS"
    assert texts(tagged, include_proper=False) == ["pilot"]
    assert texts(tagged) == ["boeing", "london", "pilot"]


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
        ("big/JJ one/NN glass/NN brick/NN tower/NN", ["glass brick tower"]),
        ("a/DT metal/NN city/NN park/NN street/NN", ["metal", "city park street"]),
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
wine-glasses wine-glasses, police-men police-man, specimens specimen,
menus menu, emus emu, safaris safari, alibis alibi, gurus guru, tofus tofu, haikus haiku,
bijous bijou, caribous caribou, thesauruses thesaurus, gnus gnu, flus flu, tutus tutu, zebus zebu,
bayous bayou, plateaus plateau, chapeaux chapeau, bureaux bureau, gateaux gateau, tableaux tableau,
beaux beau, kiwis kiwi, saris sari, salamis salami, tsunamis tsunami, origamis origami,
graffitis graffiti, yetis yeti, jacuzzis jacuzzi, zucchinis zucchini, chilis chili,
martinis martini, paparazzi paparazzo, spermatozoa spermatozoon, oases oasis, crises crisis,
bases base, analyses analysis, theses thesis, ellipses ellipse, diagnoses diagnosis,
metropolises metropolis, thermoses thermos, rhinoceroses rhinoceros, triceratopses triceratops,
platypuses platypus, hippopotamuses hippopotamus, crocuses crocus, circuses circus, campuses campus,
abacuses abacus, fetuses fetus, mongooses mongoose, lice louse, dice dice, dormice dormouse,
oxen ox, sheaves sheaf, dwarves dwarf, wharves wharf, hooves hoof, roofs roof, chefs chef,
reefs reef, cliffs cliff, handkerchiefs handkerchief, handkerchieves handkerchief, staves staff,
turves turf, beehives beehive, caves cave, graves grave, doves dove, hives hive, archives archive,
valves valve, alcoves alcove, groves grove, coves cove, avocados avocado, flamingos flamingo,
flamingoes flamingo, mangoes mango, mangos mango, volcanoes volcano, volcanos volcano,
mosquitoes mosquito, buffaloes buffalo, dominoes domino, tornadoes tornado, torpedoes torpedo,
cargoes cargo, echoes echo, embargoes embargo, oboes oboe, tiptoes tiptoe, hoes hoe, aloes aloe,
floes floe, does doe, roes roe, igloos igloo, tattoos tattoo, bamboos bamboo, cockatoos cockatoo,
pixies pixie, genies genie, zombies zombie, hoodies hoodie, selfies selfie, smoothies smoothie,
birdies birdie, prairies prairie, sorties sortie, pies pie, magpies magpie, collies collie,
eyries eyrie, calories calorie, aeries aerie, lassies lassie, budgies budgie, huskies husky,
trolleys trolley, cherries cherry, spies spy, libraries library, butterflies butterfly, lilies lily,
pansies pansy, daisies daisy, poppies poppy, ponies pony, waltzes waltz, topazes topaz, buzzes buzz,
blitzes blitz, gases gas, yeses yes, pluses plus, irises iris, canvases canvas, atlases atlas,
trellises trellis, pancreases pancreas, aliases alias, cosmoses cosmos, cases case,
suitcases suitcase, hoses hose, mouses mouse, cheeses cheese, phrases phrase, bruises bruise,
cruises cruise, fuses fuse, excuses excuse, muses muse, glimpses glimpse, corpses corpse,
sunrises sunrise, franchises franchise, warehouses warehouse, lighthouses lighthouse,
tortoises tortoise, porpoises porpoise, mayonnaises mayonnaise, matrices matrix, vertices vertex,
indices index, appendices appendix, fungi fungus, octopi octopus, nuclei nucleus, stimuli stimulus,
alumni alumnus, larvae larva, algae alga, formulae formula, antennae antenna, nebulae nebula,
vertebrae vertebra, bacteria bacterium, aquaria aquarium, stadia stadium, criteria criterion,
phenomena phenomenon, ganglia ganglion, media medium, strata stratum, errata erratum,
memoranda memorandum, curricula curriculum, candelabra candelabrum, graffiti graffiti,
confetti confetti, spaghetti spaghetti, passersby passerby, caches cache, aches ache,
moustaches moustache, avalanches avalanche, quiches quiche, creches creche, niches niche,
brioches brioche, stomachs stomach, monarchs monarch, epochs epoch, axolotls axolotl,
xylophones xylophone, scarfs scarf, halves half, elves elf, thieves thief, penknives penknife,
midwives midwife, housewives housewife, lives life, werewolves werewolf, mermen merman,
policewomen policewoman, humans human, germans german, talismans talisman, ottomans ottoman,
romans roman, brahmans brahman, sea-lions sea-lion, drones drone, bikinis bikini, rabbis rabbi,
khakis khakis, binoculars binoculars, trousers trousers, species species, jellyfish jellyfish,
goldfish goldfish, reindeer reindeer, swordfish swordfish, hovercraft hovercraft, salmon salmon,
bison bison, elk elk, swine swine, dinosaurs dinosaur, stegosauruses stegosaurus,
pterodactyls pterodactyl, velociraptors velociraptor, waffles waffle, croissants croissant,
macarons macaron, baguettes baguette, burritos burrito, tacos taco, sushis sushi,
dumplings dumpling, samosas samosa, lassos lasso, rhinos rhino, hippos hippo, dingos dingo,
geckos gecko, armadillos armadillo, stilettos stiletto, kimonos kimono, casinos casino, silos silo,
torsos torso, cellos cello, banjos banjo, ponchos poncho, gazebos gazebo, studios studio,
patios patio, radios radio, videos video, rodeos rodeo, cameos cameo, embryos embryo,
portfolios portfolio, trios trio, yo-yos yo-yo, lynxes lynx, sphinxes sphinx, phoenixes phoenix,
ibexes ibex, suffixes suffix, complexes complex, duplexes duplex, saxes sax, waxes wax, faxes fax,
taxes tax, climaxes climax, thoraxes thorax, syntaxes syntax, orchids orchid, chassis chassis,
cobras cobra, pandas panda, koalas koala, llamas llama, alpacas alpaca, gorillas gorilla,
chinchillas chinchilla, hyenas hyena, iguanas iguana, tarantulas tarantula, sofas sofa,
pizzas pizza, umbrellas umbrella, tiaras tiara, marinas marina, pagodas pagoda, arenas arena,
villas villa, verandas veranda, sodas soda, bananas banana, papayas papaya, tortillas tortilla,
lasagnas lasagna, bonsais bonsai, samurais samurai, mais mai, dais dais
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


@pytest.mark.parametrize("part", ["looked_at", "held_out"])
def test_nouns_of_prompts_for_generators_agree_with_those_labelled_by_hand(part):
    """100 captions in the manner of prompts, written and labelled before the rules were made.

    Mistakes on those of `looked_at` have since led to changes of the rules; the others have not.
    """
    items = json.loads((Path(__file__).parent / "data" / "prompt_nouns.json").read_text())[part]
    stage = ExtractNouns().build()
    captions = [
        Caption(key=str(i), text=item["caption"], source="") for i, item in enumerate(items)
    ]
    found = right = expected = 0
    for item, answer in zip(items, stage(iter(captions)), strict=True):
        mine = {noun.text for noun in getattr(answer, "nouns", ())}
        gold = {*item["nouns"], *item["proper"]}
        found, right, expected = found + len(mine), right + len(mine & gold), expected + len(gold)
    assert right / found > 0.94
    assert right / expected > 0.94


# -- what shows no region -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tagged", "expected"),
    [
        ("a/DT watercolor/NN painting/NN of/IN a/DT fox/NN", ["fox"]),
        ("a/DT pencil/NN drawing/NN of/IN a/DT hand/NN", ["hand"]),
        ("an/DT ink/NN wash/NN painting/NN of/IN a/DT crane/NN", ["crane"]),
        ("a/DT diagram/NN of/IN a/DT steam/NN engine/NN", ["steam engine"]),
        ("pixel/NN art/NN corgi/NN pizza/NN", ["corgi pizza"]),
        ("a/DT castle/NN ,/, digital/JJ painting/NN", ["castle"]),
        ("a/DT castle/NN ,/, concept/NN art/NN", ["castle"]),
        ("a/DT dog/NN illustration/NN", ["dog"]),
        ("a/DT painting/NN above/IN a/DT sofa/NN", ["painting", "sofa"]),
        ("a/DT pencil/NN on/IN a/DT drawing/NN", ["pencil", "drawing"]),
        ("a/DT movie/NN poster/NN", ["movie poster"]),
        ("a/DT herd/NN of/IN elephants/NNS", ["elephant"]),
        ("a/DT series/NN of/IN doors/NNS", ["door"]),
        ("a/DT steampunk/NN version/NN of/IN a/DT phone/NN", ["phone"]),
        ("a/DT school/NN of/IN fish/NN", ["fish"]),
        ("a/DT school/NN with/IN a/DT flag/NN", ["school", "flag"]),
        ("a/DT close/NN up/RP of/IN a/DT bee/NN", ["bee"]),
    ],
)
def test_media_and_amounts_are_no_nouns(tagged, expected):
    assert texts(tagged) == expected


@pytest.mark.parametrize(
    ("tagged", "expected"),
    [
        ("a/DT house/NN with/IN no/DT windows/NNS", ["house"]),
        ("a/DT street/NN without/IN people/NNS or/CC cars/NNS", ["street"]),
        ("a/DT street/NN without/IN any/DT parked/VBN cars/NNS", ["street"]),
        ("a/DT room/NN without/IN a/DT door/NN and/CC a/DT bed/NN", ["room", "bed"]),
        ("a/DT street/NN free/JJ of/IN cars/NNS", ["street"]),
        ("not/RB a/DT cloud/NN over/IN the/DT sea/NN", ["sea"]),
        ("no/DT text/NN ,/, a/DT blue/JJ car/NN", ["car"]),
        ("a/DT no/DT parking/NN sign/NN", ["no parking sign"]),
        ("wolves/NNS without/IN fur/NN in/IN snow/NN", ["wolf", "snow"]),
    ],
)
def test_what_is_not_there_is_no_noun(tagged, expected):
    assert texts(tagged) == expected


@pytest.mark.parametrize(
    ("tagged", "expected"),
    [
        ("a/DT two/CD lane/NN road/NN", ["road"]),
        ("a/DT 3/CD story/NN building/NN", ["building"]),
        ("two/CD stop/NN signs/NNS", ["stop sign"]),
        ("one/CD street/NN lamp/NN", ["street lamp"]),
        ("a/DT black/JJ hole/NN", ["black hole"]),
        ("a/DT rocking/VBG chair/NN", ["rocking chair"]),
        ("a/DT stained/VBN glass/NN window/NN", ["stained glass window"]),
        ("a/DT snowy/NN forest/NN", ["forest"]),
    ],
)
def test_measures_and_compounds_of_adjectives(tagged, expected):
    assert texts(tagged) == expected


@pytest.mark.parametrize(
    ("tagged", "expected"),
    [
        ("a/DT rhinoceros/NNS and/CC a/DT triceratops/NNS", ["rhinoceros", "triceratops"]),
        ("a/DT brachiosaurops/NNS", ["brachiosaurops"]),
        ("a/DT thermos/NNS and/CC two/CD menus/NNS", ["thermos", "menu"]),
        ("an/DT oasis/NNS", ["oasis"]),
        ("two/CD emus/NN", ["emu"]),
        ("ramen/NNS", ["ramen"]),
    ],
)
def test_singulars_whatever_the_tagger_calls_them(tagged, expected):
    assert texts(tagged) == expected


# -- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tagged", "expected"),
    [
        ("a/DT Ferrari/NNP Testarossa/NNP in/IN the/DT snow/NN", ["ferrari testarossa", "snow"]),
        ("a/DT view/NN of/IN Ha/NNP Long/NNP Bay/NNP", ["ha long bay"]),
        ("the/DT Eiffel/NNP tower/NN", ["eiffel tower"]),
        ("a/DT red/JJ Porsche/NNP 356/CD by/IN a/DT lake/NN", ["porsche 356", "lake"]),
        ("a/DT boeing/NN 747/CD", ["boeing 747"]),
        ("an/DT F/NN _-/HYPH _16/CD above/IN clouds/NNS", ["f-16", "cloud"]),
        ("the/DT Statue/NNP of/IN Liberty/NNP", ["statue of liberty"]),
        ("the/DT Great/JJ Wall/NN of/IN China/NNP", ["great wall of china"]),
        ("St./NNP Paul/NNP _'s/POS Cathedral/NNP", ["st. paul's cathedral"]),
        ("an/DT Apple/NNP laptop/NN", ["laptop"]),
        ("a/DT Volkswagen/NNP van/NN", ["van"]),
        ("a/DT Victorian/NNP house/NN", ["house"]),
        ("a/DT street/NN in/IN Tokyo/NNP", ["street"]),
        ("a/DT bench/NN in/IN Central/NNP Park/NNP", ["bench", "central park"]),
        ("a/DT bridge/NN in/IN Sydney/NNP ,/, Australia/NNP", ["bridge"]),
        ("a/DT hill/NN by/IN Thomas/NNP Kinkade/NNP", ["hill"]),
        ("a/DT cat/NN in/IN the/DT style/NN of/IN Van/NNP Gogh/NNP", ["cat"]),
        ("a/DT sign/NN that/WDT says/VBZ Othello/NNP", ["sign"]),
        ("a/DT corner/NN of/IN Lynn/NNP and/CC Bigelow/NNP", []),
        ("a/DT Madison/NNP Avenue/NNP bus/NN", ["bus"]),
        ("Giraffes/NNPS eat/VBP leaves/NNS", ["giraffe", "leaf"]),
        ("the/DT Moon/NNP and/CC the/DT Sun/NNP", ["moon", "sun"]),
        ("a/DT sandy/NNP beach/NN", ["beach"]),
        ("two/CD Frisbees/NNPS", ["frisbee"]),
        ("a/DT flat/JJ screen/NN TV/NN", ["flat screen tv"]),
        ("a/DT dog/NN without/IN Santa/NNP", ["dog"]),
        ("a/DT tree/NN at/IN Christmas/NNP", ["tree"]),
    ],
)
def test_names_are_one_noun_each_where_they_show_a_region(tagged, expected):
    assert texts(tagged) == expected


def test_names_have_the_span_of_what_the_caption_says():
    tagged = doc("near/IN St./NNP Paul/NNP _'s/POS Cathedral/NNP ,/, a/DT Boeing/NNP 747/CD")
    assert [tagged.text[noun.start : noun.end] for noun in nouns_of(tagged)] == [
        "St. Paul's Cathedral",
        "Boeing 747",
    ]


# -- given classes ------------------------------------------------------------------------------

CLASSES = (
    ("Garlic Press", "garlic crusher"), ("petri dish",), ("table", "desk"), ("kitchen",), ("dog",),
    ("person", "man", "woman"), ("Nutella",), ("wine glass",), ("painting",), ("bridge",),
)  # fmt: skip


@pytest.mark.parametrize(
    ("tagged", "expected"),
    [
        # Several words count however they are tagged, and what describes them does not.
        ("a/DT garlic/JJ press/VB", ["garlic press"]),
        ("two/CD steel/NN garlic/NN Presses/NNS", ["garlic press"]),
        ("a/DT garlic/JJ crusher/NN", ["garlic press"]),
        ("a/DT petri/FW dish/NN lid/NN and/CC a/DT cat/NN", ["petri dish", "lid", "cat"]),
        ("three/CD wine/NN glasses/NNS of/IN water/NN", ["wine glass", "water"]),
        # Single words must be nouns, with none behind them, and may have some before.
        ("a/DT kitchen/NN table/NN in/IN a/DT kitchen/NN", ["table", "kitchen"]),
        ("she/PRP dogs/VBZ the/DT man/NN", ["person"]),
        ("two/CD men/NNS and/CC a/DT woman/NN at/IN desks/NNS", ["person", "table"]),
        ("a/DT man/NN dog/NN", ["person", "dog"]),
        # Known compounds, names and media stay what they are.
        ("a/DT hot/JJ dog/NN on/IN a/DT dining/NN table/NN", ["hot dog", "dining table"]),
        ("a/DT stuffed/JJ toy/NN dog/NN", ["stuffed toy", "dog"]),
        ("the/DT Brooklyn/NNP Bridge/NNP", ["brooklyn bridge"]),
        ("a/DT painting/NN of/IN a/DT boat/NN", ["boat"]),
        # A word that no lexicon has is a name.
        ("a/DT Nutella/NNP jar/NN", ["nutella", "jar"]),
        ("nutella/JJ", ["nutella"]),
        # What is not there.
        ("no/DT garlic/NN press/NN", []),
        ("a/DT cat/NN without/IN a/DT desk/NN", ["cat"]),
    ],
)
def test_given_classes_go_before_the_tagger(tagged, expected):
    assert texts(tagged, given=given_names(CLASSES, BLANK.make_doc)) == expected


def test_a_given_class_has_the_span_of_what_names_it():
    tagged = doc("Steel/NN Garlic/NNP Presses/NNS and/CC desks/NNS")
    found = nouns_of(tagged, given=given_names(CLASSES, BLANK.make_doc))
    said = [(noun.text, tagged.text[noun.start : noun.end]) for noun in found]
    assert said == [("garlic press", "Garlic Presses"), ("table", "desks")]


def test_without_compounds_a_class_may_describe_a_noun():
    given = given_names(CLASSES, BLANK.make_doc)
    tagged = "a/DT kitchen/NN door/NN and/CC a/DT hot/JJ dog/NN"
    assert texts(tagged, given=given, compounds=False) == ["kitchen", "door", "dog"]


def test_stop_nouns_are_no_classes_unless_they_are_several_words():
    given = given_names([("group",), ("photo booth",)], BLANK.make_doc)
    tagged = "a/DT group/NN in/IN a/DT photo/NN booth/NN"
    assert texts(tagged, given=given) == ["photo booth"]
    assert texts(tagged, given=given, stop_nouns=()) == ["group", "photo booth"]
