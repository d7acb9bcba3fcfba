from collections import Counter

import numpy as np
import pytest

from ovref.config import parse
from ovref.contract import Dropped
from ovref.errors import ConfigError, InputError
from ovref.records import Noun, Prompt
from ovref.select_prompts import SelectPrompts, select_prompts
from ovref.storage.steps import open_step
from ovref.storage.store import Store

NOUNS = [["cat", "mat"], ["cat"], ["cat", "dog"], ["cat", "mat"], ["dog"], ["cat"], [], ["owl"]]


@pytest.fixture
def store(tmp_path):
    return Store.open(str(tmp_path))


@pytest.fixture
def source(store):
    """Prompts `k0` to `k7` in shards of three, three and two."""
    step = open_step(store, "prompts", {})
    prompts = [
        Prompt(
            key=f"k{n}",
            caption=" ".join(nouns),
            nouns=tuple(Noun(text=noun, start=0, end=3) for noun in nouns),
            source="",
        )
        for n, nouns in enumerate(NOUNS)
    ]
    for number, start in enumerate(range(0, 8, 3)):
        part = prompts[start : start + 3]
        step.commit(f"{number:06d}", part, inputs=len(part))
    step.finish(["000000", "000001", "000002"])
    return step


def select(store, source, max_per_noun, name="selected", **options):
    target = open_step(store, name, {"max_per_noun": max_per_noun}, [source.fingerprint])
    select_prompts(SelectPrompts(max_per_noun=max_per_noun), source, target, **options)
    return target


def keys(step):
    return [[record.key for record in step.read(shard)] for shard in step.complete()]


@pytest.mark.parametrize(
    ("max_per_noun", "expected"),
    [
        # k2 is kept for its dog, though there are cats enough; nothing but cats is not.
        (1, [["k0", "k2"], [], ["k7"]]),
        (2, [["k0", "k1", "k2"], ["k3", "k4"], ["k7"]]),
        (100, [["k0", "k1", "k2"], ["k3", "k4", "k5"], ["k7"]]),
    ],
)
def test_prompts_are_kept_while_a_noun_is_under_the_cap(store, source, max_per_noun, expected):
    target = select(store, source, max_per_noun)
    assert keys(target) == expected
    assert next(target.read("000000")) == next(source.read("000000"))
    assert Dropped("k6", "nouns_capped") in target.drops("000002")
    dropped = sum((Counter(commit.dropped) for commit in target.commits().values()), Counter())
    assert dropped == {"nouns_capped": 8 - sum(map(len, expected))}


class InterruptionError(Exception):
    pass


@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupted_selection_goes_on_to_the_same_bytes(store, source, after):
    seen = []

    def interrupt(commit):
        seen.append(commit.shard)
        if len(seen) == after:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        select(store, source, 2, on_progress=interrupt)
    target = open_step(store, "selected", {"max_per_noun": 2}, [source.fingerprint])
    assert target.complete() is None and len(target.committed()) == after
    again, whole = select(store, source, 2), select(store, source, 2, name="whole")
    files = [{s: c.files for s, c in step.commits().items()} for step in (again, whole)]
    assert files[0] == files[1]


def test_an_incomplete_source_is_refused(store):
    source = open_step(store, "prompts", {})
    with pytest.raises(InputError, match="is not complete: selecting needs all"):
        select(store, source, 2)


def test_the_cap_is_checked():
    with pytest.raises(ValueError, match="max_per_noun must be at least 1, found 0"):
        SelectPrompts(max_per_noun=0)
    with pytest.raises(ConfigError, match="either max_per_noun or order"):
        parse(SelectPrompts, {})
    with pytest.raises(ConfigError, match="order"):
        parse(SelectPrompts, {"order": "best_first"})


def rare_first(store, source, name="ordered", max_per_noun=None, **options):
    spec = SelectPrompts(max_per_noun=max_per_noun, order="rare_first")
    target = open_step(store, name, {"of": max_per_noun}, [source.fingerprint])
    select_prompts(spec, source, target, **options)
    return target


def test_nouns_take_turns(store, source):
    # First of each: k0 cat and mat, k2 dog, k7 owl; then the second cat, mat and dog, ...
    assert keys(rare_first(store, source)) == [["k0", "k2", "k7"], ["k1", "k3", "k4"], ["k5"]]
    # Kept are the same prompts as in the order of the corpus.
    assert keys(rare_first(store, source, "capped", 1)) == [["k0", "k2", "k7"], [], []]
    target = rare_first(store, source, "two", 2)
    assert keys(target) == [["k0", "k2", "k7"], ["k1", "k3", "k4"], []]
    drops = {shard: target.drops(shard) for shard in target.complete()}
    assert drops == {
        "000000": [],
        "000001": [Dropped("k5", "nouns_capped")],
        "000002": [Dropped("k6", "nouns_capped")],
    }
    assert sum(commit.inputs for commit in target.commits().values()) == len(NOUNS)
    assert next(target.read("000000")) == next(source.read("000000"))


def test_after_any_number_of_prompts_no_noun_lags_behind(store):
    """Against the property itself, on many prompts of a long-tailed vocabulary."""
    rng = np.random.default_rng(0)
    texts = [[f"n{int(n)}" for n in set(rng.zipf(1.4, size=3).clip(1, 40))] for _ in range(600)]
    source = open_step(store, "many", {})
    for number in range(12):
        prompts = [
            Prompt(
                key=f"k{n}", caption="", source="", image=b"\xff\xd8\xff" + bytes([n % 256]),
                nouns=tuple(Noun(text=text, start=0, end=1) for text in texts[n]),
            )
            for n in range(50 * number, 50 * number + 50)
        ]  # fmt: skip
        source.commit(f"{number:06d}", prompts, inputs=50)
    source.finish([f"{number:06d}" for number in range(12)])
    target = rare_first(store, source, "rare")
    records = [record for shard in target.complete() for record in target.read(shard)]
    assert sorted(record.key for record in records) == sorted(f"k{n}" for n in range(600))
    assert all(record.image[3] == int(record.key[1:]) % 256 for record in records)
    total, seen = Counter(noun for nouns in texts for noun in nouns), Counter()
    before = Counter()
    turns = {}
    for n, nouns in enumerate(texts):
        turns[f"k{n}"] = min(before[noun] for noun in nouns)
        before.update(nouns)
    for record in records:
        # Whoever's turn it is, every other noun has had as many, or all that there are of it.
        turn = turns[record.key]
        assert all(seen[noun] >= min(turn, total[noun]) for noun in total)
        seen.update(noun.text for noun in record.nouns)
    early = {noun.text for record in records[: len(total)] for noun in record.nouns}
    assert early == set(total)


@pytest.mark.parametrize("spools", [1, 2, 128])
@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_ordering_goes_on_to_the_same_bytes(
    store, source, monkeypatch, spools, after
):
    monkeypatch.setattr("ovref.select_prompts.SPOOLS", spools)
    seen = []

    def interrupt(commit):
        seen.append(commit.shard)
        if len(seen) == after:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        rare_first(store, source, on_progress=interrupt)
    again, whole = rare_first(store, source), rare_first(store, source, "whole")
    files = [{s: c.files for s, c in step.commits().items()} for step in (again, whole)]
    assert files[0] == files[1]
