"""Builds that meet what happens on real machines, and then go on: to the same bytes, every input
answered once. Each runs in processes of its own, from captions to the published collection."""

import json
import random
import shutil
import time

import pytest
from faulty_s3 import FaultyS3
from pipeline_fakes import ObedientSpec, caption_step, files_of
from recipe_fakes import (
    answered_once,
    build_through,
    content_of,
    fake_build,
    finish,
    kill_at_random,
    processes,
    run_fake_build,
)

from ovref.errors import StorageError
from ovref.identity import spec_identity
from ovref.reduce.spec import ReduceSpec
from ovref.storage.file_store import Store, check_conditional_create
from ovref.storage.steps import existing_step, open_step
from ovref_pipelines import recipe
from ovref_pipelines.engine.config import EngineConfig
from ovref_pipelines.engine.run_steps import run_step

CAPTIONS, SHARD_SIZE = 24, 4


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The bytes of an undisturbed build, and the CPU time that it took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = fake_build(folder, CAPTIONS, SHARD_SIZE)
    seconds = finish(config)
    assert answered_once(config)
    return content_of(config), seconds


def check(config, undisturbed):
    assert content_of(config) == undisturbed[0]
    assert answered_once(config)


def test_a_build_killed_at_random_moments(tmp_path, undisturbed):
    config = fake_build(tmp_path, CAPTIONS, SHARD_SIZE)
    killed = kill_at_random(config, random.Random(3), 0.6 * undisturbed[1], 6)
    check(config, undisturbed)
    assert killed  # six times in a row faster than ever before is not to be expected


PARTITIONED = {"reduce": ReduceSpec(partition_references=5)}


@pytest.fixture(scope="module")
def in_partitions(tmp_path_factory):
    """Finished steps; the bytes of a collection in partitions made of them, and its CPU time."""
    folder = tmp_path_factory.mktemp("in_partitions")
    finish(fake_build(folder, CAPTIONS, SHARD_SIZE))
    steps = folder / "steps"
    shutil.copytree(folder / "out", steps, ignore=lambda *_: ["collection"])
    config = fake_build(folder, CAPTIONS, SHARD_SIZE, output=str(folder / "made"), **PARTITIONED)
    shutil.copytree(steps, folder / "made")
    seconds = finish(config)
    found = content_of(config)
    assert len({path for path in found if path.endswith("references.parquet")}) > 3
    return steps, found, seconds


@pytest.mark.parametrize("seed", range(2))
def test_a_reduction_in_partitions_killed_at_random_moments(tmp_path, in_partitions, seed):
    steps, wanted, seconds = in_partitions
    shutil.copytree(steps, tmp_path / "out")
    config = fake_build(tmp_path, CAPTIONS, SHARD_SIZE, **PARTITIONED)
    killed = kill_at_random(config, random.Random(seed), 0.9 * seconds, 5)
    assert killed and set(killed) == {"collection"}
    assert content_of(config) == wanted
    left = {path.suffix for path in (tmp_path / "work").iterdir()}
    # A kill after the manifest is written, before the lock is released, leaves an empty lock file.
    assert left - {".lock"} == {".parquet"}


@pytest.mark.slow
def test_a_reduction_in_partitions_where_a_tenth_of_the_requests_to_s3_fails(
    tmp_path, s3_endpoint, s3_environment, in_partitions
):
    steps, wanted, _ = in_partitions
    options = {"endpoint_url": s3_endpoint, "key": "testing", "secret": "testing"}
    place = Store.open("s3://bucket/partitions", **options)
    local = Store.open(str(steps))
    for path in local.list():
        place.write(path, local.read(path))
    config = fake_build(tmp_path, CAPTIONS, SHARD_SIZE, output=place.url, **PARTITIONED)
    with FaultyS3(s3_endpoint, 0.1, seed=1, late_s=2.5) as proxy:
        build_through(config, proxy.url)
        spoilt = sum(n for fault, n in proxy.requests.items() if fault != "none")
        assert spoilt > 0.05 * proxy.requests.total() > 10
    assert content_of(config) == wanted


def test_two_builds_on_one_output(tmp_path, undisturbed):
    config = fake_build(tmp_path, CAPTIONS, SHARD_SIZE)
    other = fake_build(tmp_path, CAPTIONS, SHARD_SIZE)
    children = [processes().Process(target=run_fake_build, args=[c]) for c in (config, other)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    check(config, undisturbed)


@pytest.mark.parametrize("limit_bytes", [2_000, 11_000])
def test_a_disk_that_is_full(tmp_path, undisturbed, limit_bytes):
    config = fake_build(tmp_path, CAPTIONS, SHARD_SIZE)
    child = processes().Process(target=run_fake_build, args=[config, limit_bytes])
    child.start()
    child.join()
    assert child.exitcode == 2
    assert "full" in (tmp_path / "error.txt").read_text()
    assert not list((tmp_path / "out").rglob("_quarantine/*"))
    finish(config)
    check(config, undisturbed)


def test_a_model_that_cannot_be_loaded(tmp_path, undisturbed):
    config = fake_build(tmp_path, CAPTIONS, SHARD_SIZE, model="missing")
    child = processes().Process(target=run_fake_build, args=[config])
    child.start()
    child.join()
    assert child.exitcode == 2
    assert (tmp_path / "error.txt").read_text().startswith("ModelError: the model missing is not")
    assert not (tmp_path / "out" / "captions").exists()
    fixed = fake_build(tmp_path, CAPTIONS, SHARD_SIZE)
    finish(fixed)
    check(fixed, undisturbed)


@pytest.mark.parametrize("seed", range(2))
def test_a_tenth_of_the_requests_to_s3_fails(tmp_path, s3_endpoint, seed, monkeypatch):
    monkeypatch.setattr("ovref_pipelines.engine.run_steps.OUTAGE_SECONDS", ())
    texts = [[f"plain {n} {m}" for m in range(3)] + [f"drop {n}"] for n in range(6)]
    spec = ObedientSpec(scratch=str(tmp_path))
    identity = {"stages": [spec_identity(spec) | {"fields": {}}]}
    local = caption_step(str(tmp_path), texts)
    wanted = open_step(Store.open(str(tmp_path)), "prompts", identity, [local.fingerprint])
    config = EngineConfig(engine="local", attempts=4)
    run_step([spec], local, wanted, config)

    quick = {"connect_timeout": 2, "read_timeout": 2, "retries": {"max_attempts": 0}}
    options = {"key": "testing", "secret": "testing", "config_kwargs": quick}
    prefix = f"s3://bucket/faults{seed}"
    direct = Store.open(prefix, endpoint_url=s3_endpoint, **options)
    source = open_step(direct, "captions", local.identity)
    for shard in local.committed():
        source.commit(shard, local.read(shard), inputs=4)
    source.finish(local.committed())
    with FaultyS3(s3_endpoint, 0.1, seed, late_s=4.0) as proxy:
        store = Store.open(prefix, endpoint_url=proxy.url, **options)
        for _ in range(40):
            try:
                check_conditional_create(store)
                captions = open_step(store, "captions", local.identity)
                target = open_step(store, "prompts", identity, [captions.fingerprint])
                summary = run_step([spec], captions, target, config)
                if target.complete() is not None:
                    break
            except OSError:  # `ovref build` calls this transient: the same command resumes
                continue
            except StorageError as error:
                raise AssertionError(f"taken for something that does not pass: {error}") from error
        assert sum(n for fault, n in proxy.requests.items() if fault != "none") > 3
    assert summary.inputs == 24 and summary.dropped == {"asked_to_drop": 6}
    made = existing_step(direct, "prompts")
    assert files_of(made) == files_of(wanted)


def test_reports_and_json_lines_of_a_build(tmp_path, capsys, monkeypatch):
    import recipe_fakes

    monkeypatch.setattr(recipe, "_LazyTexts", recipe_fakes.FakeTexts)
    config = fake_build(tmp_path, 8, 4)
    engine = EngineConfig(engine="local", log="json", progress_seconds=1e-6)
    object.__setattr__(config, "engine", engine)
    before = time.time()
    recipe.build(config)
    assert time.time() > before
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {line["step"] for line in lines} == {"prompts", "images", "references"}
    assert all(line.keys() >= {"time", "step", "event", "message"} for line in lines)
    shown = [line for line in lines if line["event"] == "progress"]
    assert shown and all(line["shards"] == 2 for line in shown)
    for name in ("prompts", "images", "references"):
        report = json.loads((tmp_path / "out" / "reports" / f"{name}.json").read_text())
        assert report["step"] == name and report["committed"] == report["shards"] == 2
        assert report["inputs"] == report["answered"] == 8 and report["trouble"] == {}


def test_a_whole_build_where_a_tenth_of_the_requests_to_s3_fails(
    tmp_path, s3_endpoint, s3_environment
):
    """`tests/benchmarks/spoilt_s3.py` has longer ones."""
    (tmp_path / "local").mkdir()
    local = fake_build(tmp_path / "local", 8, SHARD_SIZE)
    finish(local)
    config = fake_build(tmp_path, 8, SHARD_SIZE, output="s3://bucket/whole")
    with FaultyS3(s3_endpoint, 0.1, seed=0, late_s=2.5) as proxy:
        build_through(config, proxy.url)
        spoilt = sum(n for fault, n in proxy.requests.items() if fault != "none")
        assert spoilt > 0.05 * proxy.requests.total() > 10
    assert content_of(config) == content_of(local)
    assert answered_once(config)
