import json
import random

import pytest

from ovref.contract import Dropped
from ovref.ops.vocabulary import cap_captions, vocabulary_report, vocabulary_table
from ovref.records import Noun, Prompt


def prompt(number: int, *nouns: str) -> Prompt:
    found = tuple(Noun(text=noun, start=0, end=1) for noun in nouns)
    return Prompt(key=str(number), caption=" ".join(nouns), nouns=found, source="")


def kept(prompts, cap, counts=None) -> list[str]:
    answers = cap_captions(iter(prompts), cap, {} if counts is None else counts)
    return [answer.key for answer in answers if isinstance(answer, Prompt)]


def test_a_caption_is_kept_while_one_of_its_nouns_is_below_the_cap():
    prompts = [prompt(0, "dog"), prompt(1, "dog", "cat"), prompt(2, "dog"), prompt(3, "cat")]
    assert kept(prompts, 1) == ["0", "1"]
    assert kept(prompts, 2) == ["0", "1", "3"]
    assert kept(prompts, 9) == ["0", "1", "2", "3"]


def test_drops_say_why_and_earlier_drops_pass():
    early = Dropped("x", "no_nouns")
    answers = list(cap_captions([prompt(0, "dog"), early, prompt(1, "dog")], 1, {}))
    assert answers == [prompt(0, "dog"), early, Dropped("1", "noun_cap")]


def test_a_pass_can_be_continued_with_its_counts():
    rng = random.Random(0)
    nouns = [f"noun {i}" for i in range(12)]
    prompts = [prompt(i, *rng.sample(nouns, rng.randrange(1, 4))) for i in range(300)]
    counts: dict[str, int] = {}
    parts = kept(prompts[:100], 7, counts) + kept(prompts[100:], 7, counts)
    assert parts == kept(prompts, 7)
    occurrences = {
        noun: sum(noun in p.caption for p in prompts if p.key in parts) for noun in nouns
    }
    assert min(occurrences.values()) >= 7  # no noun that the corpus has often enough goes short


def test_nothing_in_nothing_out():
    assert kept([], 1) == []


def test_a_cap_below_one_is_refused():
    with pytest.raises(ValueError, match="cap must be at least 1, found 0"):
        kept([prompt(0, "dog")], 0)


def test_the_report_counts():
    prompts = [
        prompt(0, "dog", "brick wall"),
        prompt(1, "dog"),
        Dropped("2", "no_nouns"),
        prompt(3, "dog", "cat", "bird"),
        prompt(4, "cat"),
    ]
    report = vocabulary_report(iter(prompts), classes=["dog", "fish"], listed=2)
    assert report == {
        "captions": 4,
        "dropped": {"no_nouns": 1},
        "nouns": 4,
        "compounds": 1,
        "mentions": 7,
        "nouns_per_caption": {"1": 2, "2": 1, "3": 1},
        "coverage": {"100": 1.0, "1000": 1.0, "10000": 1.0},
        "scarce": {"2": 2, "5": 4, "20": 4},
        "top": [["dog", 3], ["cat", 2]],
        "rare": [["bird", 1], ["brick wall", 1]],
        "classes": {"dog": 3, "fish": 0},
    }
    assert json.loads(json.dumps(report)) == report


def test_coverage_is_the_share_of_the_most_frequent():
    prompts = [prompt(i, f"noun {i % 200}") for i in range(300)]
    report = vocabulary_report(prompts)
    assert report["coverage"] == {"100": round(200 / 300, 4), "1000": 1.0, "10000": 1.0}


def test_the_report_of_nothing():
    report = vocabulary_report([])
    assert (report["captions"], report["mentions"], report["coverage"]) == (0, 0, {})
    assert "captions with nouns" in vocabulary_table(report)


def test_the_table_shows_what_the_report_has():
    table = vocabulary_table(
        vocabulary_report(
            [prompt(0, "dog", "cat"), prompt(1, "dog"), Dropped("2", "no_nouns")], classes=["fish"]
        )
    )
    lines = [line.split() for line in table.splitlines()]
    assert ["captions", "with", "nouns", "2", "of", "3"] in lines
    assert ["dropped", "no_nouns", "1"] in lines
    assert ["class", "fish", "0"] in lines
    assert ["2", "dog"] in lines
