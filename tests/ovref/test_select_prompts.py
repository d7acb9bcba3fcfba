from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from ovref.config import parse
from ovref.contract import Dropped
from ovref.errors import ConfigError, InputError
from ovref.identity import spec_identity
from ovref.records import Noun, Prompt
from ovref.run_shard import run_shard
from ovref.select_prompts import SelectPrompts, select_prompts
from ovref.storage.file_store import Store
from ovref.storage.steps import existing_step, open_step

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


@pytest.mark.parametrize("order", ["corpus", "rare_first"])
@pytest.mark.parametrize("failing", ["000000", "000001", "000002"])
def test_an_interrupted_selection_goes_on_to_the_same_bytes(
    store, source, monkeypatch, failing, order
):
    def select(name):
        target = open_step(store, name, {"order": order}, [source.fingerprint])
        select_prompts(SelectPrompts(max_per_noun=2, order=order), source, target)
        return target

    def fails(stages, source, target, shard, **options):
        if shard == failing:
            raise InterruptedError
        return run_shard(stages, source, target, shard, **options)

    monkeypatch.setattr("ovref.select_prompts.run_shard", fails)
    with pytest.raises(InterruptedError):
        select("selected")
    target = existing_step(store, "selected")
    assert target.complete() is None and failing not in target.committed()
    monkeypatch.undo()
    again, whole = select("selected"), select("whole")
    files = [{s: c.files for s, c in step.commits().items()} for step in (again, whole)]
    assert files[0] == files[1] and again.complete() == whole.complete()


def test_progress_is_told_of_every_shard(store, source):
    for _ in range(2):  # made, then found
        seen = []
        select(store, source, 2, on_progress=seen.append)
        assert [commit.shard for commit in seen] == ["000000", "000001", "000002"]


@pytest.fixture
def repeating(store):
    """Prompts that repeat others but for a word, in two shards."""
    captions = [
        ("a red cat on a mat", "cat"),
        ("a red cat on the mat", "cat"),  # repeats the first
        ("a red dog on the mat", "dog"),
        ("two cats sleep in the sun", "cat"),
        ("A RED cat, on a mat!", "cat"),  # repeats the first, of the other shard
        ("an old owl in a tree", "owl"),
        ("an old owl sits in a tree", "owl"),  # repeats the one before
        ("no noun", None),
    ]
    step = open_step(store, "repeating", {})
    for number, part in enumerate((captions[:3], captions[3:])):
        prompts = [
            Prompt(
                key=f"k{3 * number + n}", caption=caption, source="",
                nouns=(Noun(text=noun, start=0, end=1),) if noun else (),
            )
            for n, (caption, noun) in enumerate(part)
        ]  # fmt: skip
        step.commit(f"{number:06d}", prompts, inputs=len(part))
    step.finish(["000000", "000001"])
    return step


@pytest.mark.parametrize(
    ("max_per_noun", "expected", "dropped"),
    [
        (None, [["k0", "k2"], ["k3", "k5"]], {"near_duplicate_caption": 3, "nouns_capped": 1}),
        # The repeated cat does not count towards the cap, so k3 is kept; k4 is beyond it.
        (2, [["k0", "k2"], ["k3", "k5"]], {"near_duplicate_caption": 2, "nouns_capped": 2}),
        (1, [["k0", "k2"], ["k5"]], {"nouns_capped": 5}),
    ],
)
def test_prompts_that_nearly_repeat_a_kept_one_are_dropped(
    store, repeating, max_per_noun, expected, dropped
):
    target = open_step(store, "selected", {}, [repeating.fingerprint])
    spec = SelectPrompts(max_per_noun=max_per_noun, near_duplicates=0.8)
    select_prompts(spec, repeating, target)
    assert keys(target) == expected
    counted = sum((Counter(commit.dropped) for commit in target.commits().values()), Counter())
    assert counted == dropped
    assert Dropped("k7", "nouns_capped") in target.drops("000001")


def test_repeated_prompts_do_not_count_towards_the_order(store):
    # Three kept cats are worth 1.83 / 3 a prompt, one kept owl 1; with its repetitions the owl's
    # shard would come last.
    shards = {
        "000000": [("a cat here", "cat"), ("cats over there now", "cat"), ("one big cat", "cat")],
        "000001": [("an old owl in a tree", "owl")] * 3 + [("an old owl sits in a tree", "owl")],
    }
    step = open_step(store, "prompts", {})
    for shard, part in shards.items():
        prompts = [
            Prompt(
                key=f"k{shard}-{n}", caption=text, nouns=(Noun(text=noun, start=0, end=1),),
                source="",
            )
            for n, (text, noun) in enumerate(part)
        ]  # fmt: skip
        step.commit(shard, prompts, inputs=len(part))
    step.finish(list(shards))
    assert in_order(store, step, "all").complete() == ["000000", "000001"]
    without = in_order(store, step, "without", near_duplicates=0.8)
    assert without.complete() == ["000001", "000000"]


def test_without_near_duplicates_a_step_has_the_identity_that_it_had_before():
    fields = spec_identity(SelectPrompts(max_per_noun=3))["fields"]
    assert fields == {"max_per_noun": 3, "order": "corpus"}
    asked = SelectPrompts(max_per_noun=3, near_duplicates=0.8)
    assert spec_identity(asked)["fields"] == fields | {"near_duplicates": 0.8}


def test_an_incomplete_source_is_refused(store):
    source = open_step(store, "prompts", {})
    with pytest.raises(InputError, match="is not complete: selecting needs all"):
        select(store, source, 2)


def test_the_cap_is_checked():
    with pytest.raises(ValueError, match="max_per_noun must be at least 1, found 0"):
        SelectPrompts(max_per_noun=0)
    with pytest.raises(ConfigError, match="either max_per_noun, order or near_duplicates"):
        parse(SelectPrompts, {})
    with pytest.raises(ConfigError, match="order"):
        parse(SelectPrompts, {"order": "best_first"})
    for value in (0.4, 1.1):
        with pytest.raises(ConfigError, match=r"near_duplicates must be in \[0.5, 1\]"):
            parse(SelectPrompts, {"near_duplicates": value})


def in_order(store, prompts, name="ordered", **settings):
    target = open_step(store, name, settings, [prompts.fingerprint])
    select_prompts(SelectPrompts(order="rare_first", **settings), prompts, target)
    return target


def test_an_order_moves_shards_and_no_prompt(store, source):
    # Of k0 to k2 three nouns; then the owl of k7, alone in its shard; then more cats and dogs.
    target = in_order(store, source)
    assert target.complete() == ["000000", "000002", "000001"]
    plain = select(store, source, 100)
    assert {s: c.files for s, c in target.commits().items()} == {
        s: c.files for s, c in plain.commits().items()
    }
    # Nothing but cats comes last, and a shard of which nothing is kept.
    assert in_order(store, source, "capped", max_per_noun=1).complete() == [
        "000000", "000002", "000001",
    ]  # fmt: skip


@pytest.fixture
def many(store):
    """600 prompts of a long-tailed vocabulary in shards of 20, with their nouns by shard."""
    rng = np.random.default_rng(0)
    step, nouns = open_step(store, "many", {}), {}
    for number in range(30):
        texts = [[f"n{int(n)}" for n in rng.zipf(1.4, size=3).clip(1, 400)] for _ in range(20)]
        nouns[shard := f"{number:06d}"] = texts
        prompts = [
            Prompt(
                key=f"k{number}-{n}", caption="", source="",
                nouns=tuple(Noun(text=text, start=0, end=1) for text in of_prompt),
            )
            for n, of_prompt in enumerate(texts)
        ]  # fmt: skip
        step.commit(shard, prompts, inputs=20)
    step.finish(list(nouns))
    return step, nouns


def worth(nouns, shards):
    """The value of all prompts of these shards: the n-th one of a noun is worth 1 / n."""
    had = Counter(text for shard in shards for texts in nouns[shard] for text in texts)
    return sum(Fraction(1, n) for count in had.values() for n in range(1, count + 1))


def test_the_next_shard_is_the_one_that_is_worth_most(store, many):
    source, nouns = many
    order = in_order(store, source).complete()
    assert sorted(order) == source.complete()
    for place in range(5):
        gains = {shard: float(worth(nouns, [*order[:place], shard])) for shard in order[place:]}
        assert gains[order[place]] == pytest.approx(max(gains.values()), abs=1e-6)


def test_after_a_third_of_the_shards_more_nouns_are_there(store, many):
    source, nouns = many
    order = in_order(store, source).complete()

    def found(shards):
        return len({text for shard in shards[:10] for texts in nouns[shard] for text in texts})

    by_chance = [found(np.random.default_rng(seed).permutation(order)) for seed in range(20)]
    assert found(order) > max(by_chance) and found(order) > 1.1 * np.mean(by_chance)


def test_a_noun_beyond_the_count_is_worth_nothing_more(store, source, monkeypatch):
    monkeypatch.setattr("ovref.select_prompts.COUNTED", 1)
    assert in_order(store, source).complete() == ["000000", "000002", "000001"]
