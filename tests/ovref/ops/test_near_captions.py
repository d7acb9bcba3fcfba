import re

import numpy as np
import pytest

from ovref.ops.near_captions import NearCaptions

NOUNS = [f"noun{number}" for number in range(6)]
OTHERS = [f"word{number}" for number in range(40)]


def kept(captions, nouns, similarity, *, at_once=7):
    """Numbers of the captions that repeat no earlier one."""
    near, found = NearCaptions(len(captions), similarity), []
    for start in range(0, len(captions), at_once):
        part = slice(start, start + at_once)
        for number, sketch in enumerate(near.sketches(captions[part], nouns[part]), start):
            if not near.has(sketch):
                near.add(sketch)
                found.append(number)
    return found


def slowly_kept(captions, nouns, similarity):
    """The same by comparing every pair."""
    found = []
    words = [set(re.findall(r"\w+", text.lower())) for text in captions]
    for number, mine in enumerate(words):
        if not any(
            set(nouns[number]) == set(nouns[other])
            and len(mine & words[other]) >= similarity * len(mine | words[other])
            for other in found
        ):
            found.append(number)
    return found


@pytest.fixture(scope="module")
def captions():
    """2,000 captions, half of them an earlier one with a few words exchanged; and their nouns."""
    rng = np.random.default_rng(0)
    texts, nouns = [], []
    for number in range(2000):
        if number % 2:
            of, words = nouns[number - 1], texts[number - 1].split(" ")
            for place in rng.choice(len(words), size=rng.integers(1, 4), replace=False):
                if words[place] not in of:
                    words[place] = str(rng.choice(OTHERS))
        else:
            of = rng.choice(NOUNS, size=rng.integers(1, 3), replace=False).tolist()
            words = rng.permutation([*of, *rng.choice(OTHERS, size=rng.integers(4, 14))]).tolist()
        texts.append(" ".join(words))
        nouns.append(of)
    return texts, nouns


@pytest.mark.parametrize(("similarity", "missed"), [(1.0, 5), (0.9, 5), (0.8, 10), (0.6, 60)])
def test_what_is_kept_is_what_comparing_all_pairs_keeps(captions, similarity, missed):
    found, wanted = (set(way(*captions, similarity)) for way in (kept, slowly_kept))
    assert len(found - wanted) <= missed and len(wanted) < 1990
    # One that was missed may be what a later one repeats, which every pair would have kept.
    assert len(wanted - found) <= missed


def test_the_number_of_captions_at_once_changes_nothing(captions):
    every = [kept(*captions, 0.8, at_once=at_once) for at_once in (1, 7, 2000)]
    assert every[0] == every[1] == every[2]


@pytest.mark.parametrize(
    ("first", "second", "nouns", "near"),
    [
        ("A cat, on a mat.", "on a mat a CAT", (["cat", "mat"], ["mat", "cat"]), True),
        ("a red cat on a mat", "a red dog on a mat", (["cat"], ["dog"]), False),
        ("a red cat on a mat", "a red cat on a mat", (["cat"], ["cat", "mat"]), False),
        ("a red cat on a mat", "a red cat on the mat", (["cat"], ["cat"]), True),  # 5 of 6
        ("a red cat on a mat", "a green cat on the mat", (["cat"], ["cat"]), False),  # 4 of 6
        ("猫", "犬", (["x"], ["x"]), False),
        ("!", "?", (["x"], ["x"]), False),
        ("", "", (["x"], ["x"]), True),
    ],
)
def test_words_and_nouns_decide(first, second, nouns, near):
    assert kept([first, second], nouns, 0.8) == ([0] if near else [0, 1])


def test_a_noun_with_very_many_captions_ends_the_search_and_repeats_nothing_falsely():
    # All bands of all captions begin at few places, where there is room for a part of them.
    captions = [f"a cat on the left of a thing numbered {number}" for number in range(3000)]
    assert kept(captions, [["cat"]] * 3000, 0.9) == list(range(3000))


def test_memory_is_known_beforehand():
    near = NearCaptions(1000, 0.8)
    sizes = [near._slots, near._nouns, near._starts, near._words]
    captions = [f"a {number} b c d e f g h i" for number in range(1000)]  # ten words
    for sketch in near.sketches(captions, [["a"]] * 1000):
        near.add(sketch)
    assert sum(len(part) * part.itemsize for part in sizes) < 86 * 1000
    assert near.sketches([], []) == []
