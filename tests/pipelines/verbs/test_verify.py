"""A build whose shards are worked at in another order. The rest of `verify` is in
`test_maintain.py`."""

import pytest
from recipe_fakes import FakeTexts, fake_build

from ovref.select_prompts import SelectPrompts
from ovref_pipelines import recipe
from ovref_pipelines.verbs.verify import verify


@pytest.fixture
def reordered(tmp_path, monkeypatch):
    """The folders of a finished build of 24 prompts in shards of 8, of which 16 are kept: the first
    four of each of six nouns. The last shard has most of the nouns."""
    monkeypatch.setattr(recipe, "_LazyTexts", FakeTexts)
    nouns = [*["cup"] * 8, *["cup", "boat"] * 4, *["tree", "fish", "cow", "owl"] * 2]
    (tmp_path / "captions.txt").write_text("".join(f"a {n} {x}\n" for n, x in enumerate(nouns)))
    select = SelectPrompts(max_per_noun=4, order="rare_first")
    config = fake_build(tmp_path, 24, 8, select_prompts=select)
    recipe.build(config)
    return config.output, recipe.open_steps(config)


def test_a_build_whose_shards_are_in_another_order_is_whole(reordered):
    output, folders = reordered
    order = folders.selected.complete()
    assert order == ["000002", "000000", "000001"]
    assert folders.images.complete() == folders.references.complete() == order
    made = [folders.images.store.age_s(f"_commits/{shard}.json") for shard in order]
    assert made == sorted(made, reverse=True)
    assert verify(output) == []


def test_a_prompt_that_was_lost_is_missed_in_its_shard(reordered):
    output, folders = reordered
    step, shard = folders.selected, "000001"
    order, (lost, *records), drops = step.complete(), step.read(shard), step.drops(shard)
    step.take_back([shard])
    step.commit(shard, records, inputs=len(records) + len(drops), drops=drops)
    step.finish(order)
    found = [line for line in verify(output) if line.startswith("selected:")]
    assert found == [
        "selected: shard 000001: its marker counts 7 inputs, prompts gave 8",
        f"selected: shard 000001: 1 inputs were not answered: {lost.key}",
    ]
