"""Records that killed their workers are retried, with everything made from their shards."""

import dataclasses

import pytest
from pipeline_fakes import files_of
from recipe_fakes import FakeTexts, content_of, fake_build

from ovref.errors import ConfigError
from ovref.run_shard import run_shard
from ovref.select_prompts import SelectPrompts
from ovref_pipelines import recipe
from ovref_pipelines.engine.ledger import CRASHED_WORKER
from ovref_pipelines.verbs import retry
from ovref_pipelines.verbs.verify import verify

SHARDS = ["000000", "000001"]


@pytest.fixture(autouse=True)
def _no_models(monkeypatch):
    monkeypatch.setattr(recipe, "_LazyTexts", FakeTexts)


def crash(config, name, shard, number):
    """Makes a shard, and what is made of it, as if a record of it had killed its workers."""
    folders = recipe.open_steps(config)
    input_of_images = folders.selected or folders.prompts
    chain = [
        ("prompts", config.extract_nouns, folders.captions, folders.prompts),
        ("images", config.synthesize, input_of_images, folders.images),
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

    folders = recipe.open_steps(config)
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
    folders = recipe.open_steps(config)
    failed = retry.failed_in(config, folders)
    assert retry.failed_text(failed) == "nothing has failed permanently"
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


@pytest.mark.parametrize("order", ["corpus", "rare_first"])
@pytest.mark.parametrize("name", ["images", "references"])
def test_what_was_made_of_selected_prompts_is_made_again(tmp_path, name, order):
    select = SelectPrompts(max_per_noun=1, order=order)
    config = fake_build(tmp_path, 12, 6, select_prompts=select, replace=True)
    recipe.build(config)
    wanted, selected = content_of(config), files_of(recipe.open_steps(config).selected)
    crash(config, name, "000000", 3)
    recipe.build(config)
    assert content_of(config) != wanted

    folders = recipe.open_steps(config)
    failed = retry.failed_in(config, folders)
    assert {one.step: one.crashed for one in failed if one.crashed} == {name: {"000000": 1}}
    assert not any(one.outdated for one in failed)
    assert retry.take_back(config, folders, failed) == 1
    assert folders.selected.committed() == SHARDS
    assert folders.images.committed() == (SHARDS if name == "references" else SHARDS[1:])
    recipe.build(config)
    assert content_of(config) == wanted and files_of(folders.selected) == selected
    assert verify(config.output) == []


def test_references_made_of_another_build_s_images(tmp_path):
    first = fake_build(tmp_path, 8, 4)
    recipe.build(first)
    second = fake_build(
        tmp_path, 8, 4, output=str(tmp_path / "second"), images_from=first.output, replace=True
    )
    recipe.build(second)
    wanted = files_of(recipe.open_steps(second).references)
    folders = recipe.open_steps(second)
    folders.references.take_back(["000001"])
    stage = second.embed.build()
    run_shard([stage], folders.images, folders.references, "000001", without={2: CRASHED_WORKER})
    failed = retry.failed_in(second, folders)
    assert retry.failed_text(failed) == (
        "references: 1 records of 1 shards killed their workers, made again"
    )
    assert retry.take_back(second, folders, failed) == 1
    assert folders.images.committed() == SHARDS
    recipe.build(second)
    assert files_of(folders.references) == wanted


def test_images_made_again_by_one_build_are_embedded_again_by_the_other(tmp_path):
    first = fake_build(tmp_path, 8, 4, replace=True)
    second = fake_build(
        tmp_path, 8, 4, output=str(tmp_path / "second"), images_from=first.output, replace=True
    )
    recipe.build(first)
    recipe.build(second)
    wanted = files_of(recipe.open_steps(second).references)
    recipe.open_steps(second).references.take_back(["000000"])
    crash(first, "images", "000000", 1)
    recipe.build(second)
    folders = recipe.open_steps(first)
    assert retry.take_back(first, folders, retry.failed_in(first, folders)) == 1
    recipe.build(first)

    folders = recipe.open_steps(second)
    assert any("1 inputs were not answered" in problem for problem in verify(second.output))
    failed = retry.failed_in(second, folders)
    assert retry.failed_text(failed) == (
        "references: 1 shards were made of shards that another build has made again since; they "
        "are made again too"
    )
    with pytest.raises(ConfigError, match="replace=true"):
        retry.take_back(dataclasses.replace(second, replace=False), folders, failed)
    assert retry.take_back(second, folders, failed) == 1
    assert folders.references.committed() == ["000001"]
    assert recipe.open_steps(first).references.committed() == SHARDS
    recipe.build(second)
    assert files_of(folders.references) == wanted and verify(second.output) == []
