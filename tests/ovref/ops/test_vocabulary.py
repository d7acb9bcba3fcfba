import json

from ovref.contract import Dropped
from ovref.ops.vocabulary import vocabulary_report
from ovref.records import Noun, Prompt


def prompt(number: int, *nouns: str) -> Prompt:
    found = tuple(Noun(text=noun, start=0, end=1) for noun in nouns)
    return Prompt(key=str(number), caption=" ".join(nouns), nouns=found, source="")


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
