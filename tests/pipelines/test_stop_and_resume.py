"""A build that is killed or stopped at any moment goes on to the same bytes."""

import random
import signal
import subprocess
import sys
import time

import pytest
from ovref_pipelines.engine import EngineConfig, run_step
from pipeline_fakes import files_of, slow_job

SHARDS = 30


def start(folder, *more):
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline_fakes", str(folder), str(SHARDS), *more],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )


def wait_for_commits(folder, count, process):
    """Until at least `count` shards are committed, for a minute at most."""
    deadline = time.monotonic() + 60
    while len(list(folder.glob("prompts/_commits/*.json"))) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Bytes of the job when nothing happens to it."""
    spec, source, target = slow_job(str(tmp_path_factory.mktemp("undisturbed")), SHARDS)
    run_step([spec], source, target, EngineConfig())
    return files_of(target)


def finish(folder):
    spec, source, target = slow_job(str(folder), SHARDS)
    summary = run_step([spec], source, target, EngineConfig())
    assert target.complete() is not None
    return summary, files_of(target)


def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path, undisturbed):
    rng = random.Random(0)
    for kills in range(1, 5):
        process = start(tmp_path)
        wait_for_commits(tmp_path, 4 * kills, process)
        time.sleep(rng.uniform(0, 0.1))  # any moment between two commits
        process.kill()
        process.communicate()
    summary, files = finish(tmp_path)
    assert summary.committed == SHARDS and 0 < summary.committed_now < SHARDS - 15
    assert files == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_finishes_its_shard_and_says_so(tmp_path, undisturbed, number):
    process = start(tmp_path)
    wait_for_commits(tmp_path, 3, process)
    process.send_signal(number)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert f"{number.name}: finishing the shards in hand" in printed
    summary, files = finish(tmp_path)
    assert 0 < summary.committed_now <= SHARDS - 3
    assert files == undisturbed


@pytest.mark.slow
def test_a_killed_ray_driver_leaves_a_state_to_resume(tmp_path, undisturbed):
    process = start(tmp_path, "engine=ray")
    wait_for_commits(tmp_path, 3, process)
    process.kill()
    process.communicate()
    summary, files = finish(tmp_path)
    assert summary.committed == SHARDS
    assert files == undisturbed
