"""A build that is killed or stopped at any moment resumes to the same bytes."""

import random
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
from pipeline_fakes import ObedientSpec, files_of, slow_job

from ovref_pipelines.engine.config import EngineConfig
from ovref_pipelines.engine.run_steps import run_step
from ovref_pipelines.engine.stopping import StoppedError

SHARDS = 40


def run_with_signal(folder, engine, number, commits, seconds=0.0):
    """A job in another process that gets the signal so long after so many commits."""
    arguments = [folder, SHARDS, engine, int(number), commits, seconds]
    return subprocess.run(
        [sys.executable, "-m", "pipeline_fakes", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Bytes of the job when nothing happens to it."""
    spec, source, target = slow_job(str(tmp_path_factory.mktemp("undisturbed")), SHARDS)
    run_step([spec], source, target, EngineConfig(engine="local"))
    return files_of(target)


def finish(folder):
    spec, source, target = slow_job(str(folder), SHARDS)
    summary = run_step([spec], source, target, EngineConfig(engine="local"))
    assert target.complete() is not None
    return summary, files_of(target)


def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path, undisturbed):
    rng = random.Random(0)
    for kill in range(4):
        # Any moment: between two commits, within a stage, within a write.
        process = run_with_signal(
            tmp_path, "local", signal.SIGKILL, 3 * kill + 1, rng.uniform(0, 0.1)
        )
        assert process.returncode == -signal.SIGKILL, process.stderr
    summary, files = finish(tmp_path)
    assert summary.committed == SHARDS and 0 < summary.committed_now <= SHARDS - 10
    assert files == undisturbed


@pytest.mark.parametrize(
    ("engine", "number"),
    [
        ("local", signal.SIGTERM),
        ("local", signal.SIGINT),
        pytest.param("ray", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_asked_to_stop_it_finishes_its_shards_and_says_so(tmp_path, undisturbed, engine, number):
    process = run_with_signal(tmp_path, engine, number, commits=3)
    assert process.returncode == 130, process.stderr
    assert f"{number.name}: finishing the shards in progress" in process.stderr
    assert "stopped as asked" in process.stderr
    summary, files = finish(tmp_path)
    assert 0 < summary.committed_now <= SHARDS - 3
    assert files == undisturbed


@dataclass(frozen=True, kw_only=True)
class Signalled(ObedientSpec):
    """Gets two signals, while it loads its models or in the midst of a shard."""

    loading: bool

    def build(self):
        inner = super().build()

        def stage(records):
            for record in inner(records):
                self.signals()
                yield record

        if self.loading:
            self.signals()
        return stage

    @staticmethod
    def signals():
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("loading", [False, True], ids=["in a shard", "while loading"])
def test_asked_to_stop_twice_it_stops_at_once_and_blames_no_shard(tmp_path, loading):
    _, source, target = slow_job(str(tmp_path), 3)
    spec = Signalled(scratch=str(tmp_path), loading=loading)
    config = EngineConfig(engine="local", attempts=1)
    with pytest.raises(StoppedError, match="stopped by a second SIGTERM"):
        run_step([spec], source, target, config)
    assert target.committed() == [] and target.store.list("_quarantine") == []


@pytest.mark.slow
def test_a_killed_ray_driver_leaves_a_state_to_resume(tmp_path, undisturbed):
    process = run_with_signal(tmp_path, "ray", signal.SIGKILL, commits=3)
    assert process.returncode == -signal.SIGKILL, process.stderr
    summary, files = finish(tmp_path)
    assert summary.committed == SHARDS
    assert files == undisturbed
