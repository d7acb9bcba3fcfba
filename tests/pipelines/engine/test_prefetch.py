"""The next shard is fetched while one is processed, but only if that saves time."""

import itertools

import fsspec
import pytest
from fake_ray import Node
from pipeline_fakes import ObedientSpec, caption_step, files_of, prompt_step

from ovref.errors import StorageError
from ovref_pipelines.engine.config import EngineConfig
from ovref_pipelines.engine.prefetch import Prefetch
from ovref_pipelines.engine.progress import Progress
from ovref_pipelines.engine.run_steps import StepRun, run_steps

TEXTS = [[f"plain {n} {m}" for m in range(3)] for n in range(12)]


@pytest.fixture
def remote():
    """A store that is not on this machine, as far as anybody can tell."""
    fsspec.filesystem("memory").store.clear()
    yield "memory://prefetch"
    fsspec.filesystem("memory").store.clear()


def keys(step, shard):
    return [record.key for record in step.read(shard)]


def test_a_shard_that_was_fetched_is_read_from_this_machine_and_leaves_nothing(
    remote, tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source = caption_step(remote, TEXTS)
    wanted = keys(source, "000001")
    ahead = Prefetch()
    ahead.begin(source, "000001")
    with ahead.place(source, "000000") as place:  # another one: from where it is
        assert place is source
    with ahead.place(source, "000001") as place:
        assert place.store.is_local
        for path in source.store.list():
            source.store.delete(path)
        assert keys(place, "000001") == wanted
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_fetched_is_read_from_where_it_is_which_says_why(remote):
    source = caption_step(remote, TEXTS)
    name = source.commit_of("000001").files["tar"].name
    source.store.write(name, b"damaged")
    ahead = Prefetch()
    ahead.begin(source, "000001")
    with ahead.place(source, "000001") as place, pytest.raises(StorageError, match="memory://"):
        keys(place, "000001")


def test_a_local_shard_is_not_copied(tmp_path):
    source = caption_step(str(tmp_path / "store"), TEXTS)
    ahead = Prefetch()
    ahead.begin(source, "000001")
    with ahead.place(source, "000001") as place:
        assert place is source


def run(url, folder, config):
    source = caption_step(url, TEXTS)
    spec = ObedientSpec(scratch=str(folder))
    target = prompt_step(url, source, spec)
    progress = Progress("prompts", every_seconds=1000)
    one = StepRun(specs=[spec], source=source, target=target, pool=config.pool, progress=progress)
    (summary,) = run_steps([one], config)
    assert summary.committed == summary.committed_now == len(TEXTS)
    return files_of(target)


def test_workers_are_given_what_is_next_and_nothing_is_run_twice(remote, tmp_path, on):
    wanted = run(str(tmp_path / "local"), tmp_path, EngineConfig(engine="local"))
    assert run(remote, tmp_path, EngineConfig(engine="local")) == wanted
    fsspec.filesystem("memory").store.clear()
    fake = on(a=Node(cpus=3))
    assert run(remote, tmp_path, EngineConfig(workers=3)) == wanted
    calls = [arguments for actor in fake.hired for name, arguments in actor.calls if name == "run"]
    assert sorted(task.shard for _, task, *_ in calls) == [f"{n:06d}" for n in range(12)]
    for actor in fake.hired:
        runs = [arguments for name, arguments in actor.calls if name == "run"]
        for (*_, upcoming, _), (_, after, *_) in itertools.pairwise(runs):
            assert upcoming in (None, after.shard)
    assert sum(upcoming is not None for *_, upcoming, _ in calls) >= 6
