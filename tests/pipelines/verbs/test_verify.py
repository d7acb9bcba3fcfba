"""What `ovref verify` finds in a step whose records stand in other shards than what they answer.

The rest of `verify` is in `test_maintain.py`.
"""

import pytest
from recipe_fakes import FakeTexts, fake_build

from ovref.select_prompts import SelectPrompts
from ovref_pipelines import recipe
from ovref_pipelines.verbs.verify import verify

SHARDS = ["000000", "000001", "000002"]


@pytest.fixture
def reordered(tmp_path, monkeypatch):
    """(output, folders) of a finished build of 24 prompts in shards of 8, of which 16 are kept: the
    first four of each of four nouns, in turns; the last shard keeps none."""
    monkeypatch.setattr(recipe, "_LazyTexts", FakeTexts)
    nouns = [*["cup"] * 8, *["cup", "boat"] * 4, *["tree", "fish"] * 4]
    (tmp_path / "captions.txt").write_text("".join(f"a {n} {x}\n" for n, x in enumerate(nouns)))
    select = SelectPrompts(max_per_noun=4, order="rare_first")
    config = fake_build(tmp_path, 24, 8, select_prompts=select)
    recipe.build(config)
    return config.output, recipe.open_steps(config)


def rewrite(step, shard, change):
    """Makes a shard again of what `change` makes of its records and drops."""
    records, drops = change(list(step.read(shard)), step.drops(shard))
    step.take_back([shard])
    step.commit(shard, records, inputs=len(records) + len(drops), drops=drops)
    step.finish(SHARDS)


def of_selected(output):
    return [line for line in verify(output) if line.startswith("selected:")]


def test_a_build_with_prompts_in_another_order_is_whole(reordered):
    output, folders = reordered
    # Otherwise nothing would stand in another shard, and there were nothing to show.
    kept, given = (
        {shard: [prompt.key for prompt in step.read(shard)] for shard in SHARDS}
        for step in (folders.selected, folders.prompts)
    )
    assert [len(keys) for keys in kept.values()] == [8, 8, 0]
    assert any(set(kept[shard]) - set(given[shard]) for shard in SHARDS)
    assert verify(output) == []


def test_a_prompt_that_was_lost(reordered):
    output, folders = reordered
    lost = next(iter(folders.selected.read("000001"))).key
    rewrite(folders.selected, "000001", lambda records, drops: (records[1:], drops))
    assert of_selected(output) == [f"selected: 1 records of prompts were not answered: {lost}"]


def test_a_drop_that_was_lost(reordered):
    output, folders = reordered
    lost = folders.selected.drops("000001")[0].key
    rewrite(folders.selected, "000001", lambda records, drops: (records, drops[1:]))
    assert of_selected(output) == [f"selected: 1 records of prompts were not answered: {lost}"]


def test_a_prompt_in_two_shards(reordered):
    output, folders = reordered
    twice = next(iter(folders.selected.read("000000")))
    rewrite(folders.selected, "000001", lambda records, drops: ([*records, twice], drops))
    assert of_selected(output) == [
        f"selected: 1 answers are to nothing of prompts, or to what has one: {twice.key}"
    ]


def test_a_prompt_kept_in_one_shard_and_dropped_in_another_where_a_third_is_lost(reordered):
    """The counts are right."""
    output, folders = reordered
    (kept, *_), (drop, *_) = folders.selected.read("000001"), folders.selected.drops("000000")
    twice = type(drop)(kept.key, drop.reason)
    rewrite(folders.selected, "000000", lambda records, drops: (records, [twice, *drops[1:]]))
    assert of_selected(output) == [
        f"selected: 1 records of prompts were not answered: {drop.key}",
        f"selected: 1 answers are to nothing of prompts, or to what has one: {kept.key}",
    ]


def test_a_damaged_file_is_named_and_nothing_else(reordered, tmp_path):
    output, folders = reordered
    name = folders.selected.commit_of("000001").files["drops.jsonl"].name
    path = tmp_path / "out" / "selected" / name
    path.write_bytes(path.read_bytes()[:-1])
    (problem,) = of_selected(output)
    assert "000001" in problem and "were committed" in problem
