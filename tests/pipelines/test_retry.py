"""What was left out because it kills its worker is made again, with all that was made of it."""

import dataclasses

import pytest
from ovref_pipelines import recipe, retry
from ovref_pipelines.ledger import CRASHED_WORKER
from recipe_fakes import FakeTexts, content_of, fake_build

from ovref.errors import ConfigError
from ovref.run_shard import run_shard
from ovref.select_prompts import SelectPrompts

SHARDS = ["000000", "000001"]


@pytest.fixture(autouse=True)
def _no_models(monkeypatch):
    monkeypatch.setattr(recipe, "_LazyTexts", FakeTexts)


def crash(config, name, shard, number):
    """Makes a shard, and what is made of it, as if a record of it had killed its workers."""
    folders = recipe.open_steps(config)
    chain = [
        ("prompts", config.extract_nouns, folders.captions, folders.prompts),
        ("images", config.synthesize, folders.prompts, folders.images),
        ("references", config.embed, folders.images, folders.references),
    ]
    first = [step for step, *_ in chain].index(name)
    for step, spec, source, target in chain[first:]:
        target.take_back([shard])
        without = {number: CRASHED_WORKER} if step == name else None
        run_shard([spec.build()], source, target, shard, without=without)
        target.finish(SHARDS)


@pytest.mark.parametrize("name", ["prompts", "images", "references"])
def test_it_is_found_taken_back_and_made_again(tmp_path, name):
    config = fake_build(tmp_path, 8, 4)
    recipe.build(config)
    wanted = content_of(config)
    crash(config, name, "000001", 2)
    recipe.build(dataclasses.replace(config, replace=True))
    assert content_of(config) != wanted

    folders = recipe.open_steps(config, create=False)
    failed = retry.failed_in(config, folders)
    assert {one.step: one.crashed for one in failed if one.crashed} == {name: {"000001": 1}}
    assert retry.failed_text(failed) == (
        f"{name}: 1 records of 1 shards killed their workers, made again"
    )
    with pytest.raises(ConfigError, match="replace=true"):
        retry.take_back(config, folders, failed)
    again = dataclasses.replace(config, replace=True)
    assert retry.take_back(again, folders, failed) == 1
    assert folders.captions.committed() == SHARDS
    assert folders.references.committed() == ["000000"]
    assert folders.references.complete() is None
    recipe.build(again)
    assert content_of(config) == wanted


def test_nothing_has_failed(tmp_path):
    config = fake_build(tmp_path, 8, 4)
    recipe.build(config)
    folders = recipe.open_steps(config, create=False)
    failed = retry.failed_in(config, folders)
    assert retry.failed_text(failed) == "nothing has failed for good"
    assert retry.take_back(config, folders, failed) == 0
    assert folders.references.committed() == SHARDS


def test_prompts_that_others_were_selected_beside_stay_as_they_are(tmp_path):
    config = fake_build(tmp_path, 8, 4, select_prompts=SelectPrompts(max_per_noun=3))
    folders = recipe.open_steps(config)
    recipe.build(config)
    folders.prompts.take_back(["000001"])
    stage = config.extract_nouns.build()
    run_shard([stage], folders.captions, folders.prompts, "000001", without={0: CRASHED_WORKER})
    failed = retry.failed_in(config, folders)
    assert "stay dropped: prompts are selected" in retry.failed_text(failed)
    assert retry.take_back(config, folders, failed) == 0
    assert folders.images.committed() == SHARDS


def test_steps_of_another_build_are_left_to_it(tmp_path):
    first = fake_build(tmp_path, 8, 4)
    recipe.build(first)
    crash(first, "images", "000000", 1)
    second = fake_build(tmp_path, 8, 4, output=str(tmp_path / "second"), images_from=first.output)
    folders = recipe.open_steps(second)
    failed = retry.failed_in(second, folders)
    assert "stay dropped: the step belongs to another build" in retry.failed_text(failed)
    assert retry.take_back(second, folders, failed) == 0
