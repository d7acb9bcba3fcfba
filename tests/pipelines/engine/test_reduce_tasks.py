"""Tasks of a reduction give the same results on a real Ray as in this process."""

import dataclasses
import os
import shutil
import sys
from functools import partial

import pytest
from recipe_fakes import FakeTexts, content_of, fake_build
from task_fakes import die_once, fails, square_of

from ovref.errors import ModelError, StorageError
from ovref.reduce.phases import in_process
from ovref.reduce.spec import ReduceSpec
from ovref.storage.file_store import Store
from ovref_pipelines import recipe
from ovref_pipelines.engine import reduce_tasks
from ovref_pipelines.engine.config import EngineConfig, PoolConfig

RAY = EngineConfig(engine="ray", workers=2)
THREE = EngineConfig(engine="ray", workers=3)


def test_the_local_engine_and_short_lists_need_no_ray(tmp_path):
    place = Store.open(str(tmp_path))
    assert reduce_tasks.spread(EngineConfig(engine="local"), place, shared=False) is in_process
    run = reduce_tasks.spread(RAY, place, shared=False)
    assert list(run([partial(square_of, 2, None), partial(os.getpid)])) == [4, os.getpid()]
    assert list(run([])) == []


@pytest.mark.parametrize("shared", [True, False])
def test_results_come_in_the_order_of_the_tasks(local_ray, tmp_path, shared):
    run = reduce_tasks.spread(RAY, Store.open(str(tmp_path)), shared=shared)
    # The first is the slowest, so that others are done before it.
    tasks = [partial(square_of, n, 0.3 if n == 0 else 0.0) for n in range(6)]
    assert list(run(tasks)) == [n * n for n in range(6)]
    assert list(tmp_path.iterdir()) == []


def test_a_task_whose_worker_dies_is_run_again(local_ray, tmp_path):
    run = reduce_tasks.spread(RAY, Store.open(str(tmp_path / "work")), shared=True)
    tasks = [partial(die_once, tmp_path / "died"), *(partial(square_of, n, None) for n in (2, 3))]
    assert list(run(tasks)) == ["alive", 4, 9]


def test_what_a_task_raises_arrives_as_it_is(local_ray, tmp_path):
    run = reduce_tasks.spread(RAY, Store.open(str(tmp_path)), shared=True)
    tasks = [partial(square_of, 1, None), partial(fails, "no space"), partial(square_of, 3, None)]
    for _ in range(5):  # an error must not end the driver, whatever the others are doing then
        with pytest.raises(StorageError, match="no space"):
            list(run(tasks))


def test_calls_run_in_processes_that_end_with_them(local_ray, tmp_path):
    """As models are tried before a build: each in a worker that leaves nothing in memory."""
    ray_tasks = sys.modules["ovref_pipelines.ray.tasks"]
    calls = [os.getpid, partial(os.path.basename, "a/b"), os.getpid]
    first, name, last = ray_tasks.run_each([(call, PoolConfig()) for call in calls], RAY)
    assert name == "b"
    assert len({first, last, os.getpid()}) == 3
    with pytest.raises(StorageError, match="no space"):
        ray_tasks.run_each([(partial(fails, "no space"), PoolConfig())] * 2, RAY)
    with pytest.raises(ModelError, match="the worker that loaded the models died"):
        ray_tasks.run_each([(partial(os._exit, 1), PoolConfig())], RAY)


def test_a_machine_that_cannot_access_the_folder_says_so(tmp_path):
    ray_tasks = sys.modules["ovref_pipelines.ray.tasks"]
    with pytest.raises(StorageError, match=r"cannot access .*omit `work`"):
        ray_tasks._call(os.getpid, Store.open(str(tmp_path / "elsewhere")), "seen-1")


def test_partitions_made_on_three_workers_are_those_made_here(local_ray, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "_LazyTexts", FakeTexts)
    monkeypatch.setattr("ovref.reduce.scatter.GROUP_ROWS", 4)
    reduce = ReduceSpec(partition_references=5)
    found = []
    for name, engine in (("here", EngineConfig(engine="local")), ("ray", THREE)):
        folder = tmp_path / name
        folder.mkdir()
        config = fake_build(folder, 16, 4, reduce=reduce)
        if found:  # of the same steps
            shutil.copytree(tmp_path / "here" / "out", folder / "out")
            shutil.rmtree(folder / "out" / "collection")
        recipe.build(dataclasses.replace(config, engine=engine))
        found.append(content_of(config))
        assert not (folder / "out" / "collection" / "_scatter").exists()
    assert found[0] == found[1]
    assert len([path for path in found[0] if path.endswith("references.parquet")]) > 2
