"""Both engines: the same bytes, and the handling of failed shards."""

import io
import json
import re
import sys
import types
from pathlib import Path

import pytest
from pipeline_fakes import ObedientSpec, caption_step, files_of, prompt_step

from ovref.errors import ConfigError, ModelError, StorageError
from ovref.storage.file_store import Store
from ovref_pipelines.engine.config import EngineConfig
from ovref_pipelines.engine.ledger import JobError, Ledger, Outcome, ShardTask
from ovref_pipelines.engine.progress import Progress
from ovref_pipelines.engine.run_steps import OUTAGE_SECONDS, run_step
from ovref_pipelines.ray import cluster as ray_cluster

PLAIN = [[f"plain {n} {m}" for m in range(3)] + [f"drop {n}"] for n in range(7)]
LOCAL = EngineConfig(engine="local")
RAY = EngineConfig(engine="ray", workers=3)
ENGINES = [pytest.param(LOCAL, id="local"), pytest.param(RAY, id="ray")]


@pytest.fixture(autouse=True)
def _ray_if_wanted(request):
    if "ray" in request.node.name:
        request.getfixturevalue("local_ray")


@pytest.fixture
def run(tmp_path):
    """Runs shards of tasks in a fresh folder: (summary, target, what was printed)."""

    def start(shards, config, name="run", **spec_fields):
        folder = tmp_path / name
        scratch = folder / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        spec = ObedientSpec(scratch=str(scratch), **spec_fields)
        source = caption_step(str(folder), shards)
        target = prompt_step(str(folder), source, spec)
        printed = io.StringIO()
        progress = Progress("prompts", stream=printed, every_seconds=1000)
        return run_step([spec], source, target, config, progress), target, printed

    return start


def quarantined_reason(target, shard):
    return json.loads(target.store.read(f"_quarantine/{shard}.json"))["reason"]


@pytest.mark.parametrize("config", ENGINES)
def test_every_shard_is_run_and_counted_once(run, config):
    summary, target, _ = run(PLAIN, config)
    assert target.committed() == [f"{n:06d}" for n in range(7)] == target.complete()
    assert (summary.shards, summary.committed, summary.committed_now) == (7, 7, 7)
    assert (summary.inputs, summary.outputs) == (28, 21)
    assert summary.dropped == {"asked_to_drop": 7}
    assert summary.quarantined == ()

    before = target.store.list()
    again, target, _ = run(PLAIN, config)
    assert again.committed_now == 0 and again.committed == 7
    assert target.store.list() == before


def test_ray_with_one_or_three_workers_and_local_give_the_same_bytes(run):
    one = EngineConfig(engine="ray", workers=1)
    shards = [
        files_of(run(PLAIN, config, name)[1])
        for name, config in (("a", LOCAL), ("b", one), ("c", RAY))
    ]
    assert shards[0] and shards[0] == shards[1] == shards[2]


@pytest.mark.parametrize("config", ENGINES)
def test_no_shards_at_all(run, config):
    summary, target, _ = run([], config)
    assert summary.shards == summary.committed == 0
    assert target.complete() == []


@pytest.mark.parametrize("config", ENGINES)
def test_an_error_is_tried_again_then_quarantined_and_the_job_goes_on(run, config):
    summary, target, printed = run([["raise once"], ["raise x"], ["plain"]], config)
    assert summary.quarantined == ("000001",) and summary.committed == 2
    assert target.committed() == ["000000", "000002"] and target.complete() is None
    assert target.commit_of("000000").attempt == 1
    reason = quarantined_reason(target, "000001")
    assert reason.startswith("Traceback") and "asked to raise by 'raise x'" in reason
    assert "shard 000000 will be tried again: ValueError: asked to raise" in printed.getvalue()
    assert "shard 000001 is quarantined: ValueError" in printed.getvalue()


@pytest.mark.parametrize(
    ("shard", "failures", "waits", "errors"),
    [("000001", 4, OUTAGE_SECONDS, 0), ("000001", 5, OUTAGE_SECONDS, 1), ("000000", 1, (), 1)],
    ids=["it comes back", "it comes back later", "it never answered before"],
)
def test_a_store_that_does_not_answer_is_waited_for(
    tmp_path, monkeypatch, shard, failures, waits, errors
):
    spec = ObedientSpec(scratch=str(tmp_path))
    source = caption_step(str(tmp_path), [["plain 0"], ["plain 1"], ["plain 2"]])
    target = prompt_step(str(tmp_path), source, spec)
    upload, refused, waited = Store.upload, [], []

    def restarting(store, local_path, path):
        if path.startswith(shard) and len(refused) < failures:
            refused.append(path)
            raise ConnectionError("the store is being restarted")
        upload(store, local_path, path)

    monkeypatch.setattr(Store, "upload", restarting)
    monkeypatch.setattr("ovref_pipelines.engine.run_steps.time.sleep", waited.append)
    progress = Progress("prompts", stream=io.StringIO(), every_seconds=1000)
    summary = run_step([spec], source, target, LOCAL, progress)
    assert target.complete() == ["000000", "000001", "000002"]
    assert waited == list(waits)
    # After the last wait it counts as one of the shard's `attempts`.
    assert summary.trouble == ({"errors": errors} if errors else {})


def test_what_a_stage_raises_is_not_waited_for(run, monkeypatch):
    waited = []
    monkeypatch.setattr("ovref_pipelines.engine.run_steps.time.sleep", waited.append)
    assert run([["raise once"]], LOCAL)[0].committed == 1 and waited == []


def test_a_quarantined_shard_gets_another_chance_in_the_next_run(run):
    shards = [["raise once"], ["plain"]]
    first, target, _ = run(shards, EngineConfig(engine="local", attempts=1))
    assert first.quarantined == ("000000",)
    second, target, _ = run(shards, LOCAL)
    assert second.quarantined == () and target.complete() == ["000000", "000001"]
    assert not target.store.exists("_quarantine/000000.json")


def test_too_many_quarantined_shards_end_the_job(run):
    few = EngineConfig(engine="local", attempts=1, max_quarantined=1)
    with pytest.raises(JobError, match=r"more than max_quarantined=1; .*asked to raise"):
        run([[f"raise {n}"] for n in range(4)], few)


@pytest.mark.parametrize("config", ENGINES)
def test_a_model_that_does_not_load_ends_the_job_at_once(run, config):
    with pytest.raises(ModelError, match="fake:none is not here"):
        run(PLAIN, config, load="missing")


def test_an_unforeseen_error_of_build_names_stage_and_place(run):
    with pytest.raises(ModelError, match=r"stage obedient cannot be built: KeyError.*fakes\.py:"):
        run(PLAIN, LOCAL, load="bug")


@pytest.mark.parametrize("config", ENGINES)
def test_a_full_disk_ends_the_job_and_quarantines_nothing(run, config, tmp_path):
    with pytest.raises(StorageError, match="disk is full"):
        run([["disk"]], config)
    assert not list(tmp_path.rglob("_quarantine/*"))


def test_ray_gives_the_shard_of_a_dead_worker_to_another(run):
    import ray

    summary, target, printed = run([["die once"], *PLAIN], RAY)
    assert summary.quarantined == () and summary.committed == 8
    assert "shard 000000 will be tried again: its worker died" in printed.getvalue()
    assert target.commit_of("000000").attempt == 1
    assert summary.trouble == {"worker_deaths": 1}
    found = re.search(r"its stderr: (worker-\*-[0-9]+\.err) in Ray's logs on ", printed.getvalue())
    logs = Path(ray.nodes()[0]["ObjectStoreSocketName"]).parents[1] / "logs"
    assert len(list(logs.glob(found[1]))) == 1


def test_ray_replaces_a_worker_that_hangs(run):
    impatient = EngineConfig(engine="ray", workers=2, shard_timeout_seconds=6.0)
    summary, _, printed = run([["hang once"], ["plain"]], impatient)
    assert summary.committed == 2
    assert "longer than shard_timeout_seconds=6" in printed.getvalue()


def test_ray_hires_again_when_a_worker_dies_while_loading(run):
    summary, _, printed = run(PLAIN, RAY, load="die once")
    assert summary.trouble == {"start_deaths": 1}
    assert summary.committed == 7
    assert "a worker died while it loaded its models" in printed.getvalue()


def test_ray_gives_up_when_every_worker_dies_while_loading(run):
    with pytest.raises(JobError, match="in a row died while they loaded"):
        run(PLAIN, RAY, load="die")


def test_ray_says_so_when_workers_cannot_import_the_stage(run, local_ray, tmp_path, monkeypatch):
    class Nowhere(ObedientSpec):
        pass

    Nowhere.__module__, Nowhere.__qualname__ = "module_of_the_driver_alone", "Nowhere"
    module = types.ModuleType("module_of_the_driver_alone")
    module.Nowhere = Nowhere
    monkeypatch.setitem(sys.modules, module.__name__, module)
    source = caption_step(str(tmp_path), [["plain"]])
    target = prompt_step(str(tmp_path), source, Nowhere(scratch=""))
    with pytest.raises(ModelError, match=r"cannot take its tasks: .*module_of_the_driver_alone"):
        run_step([Nowhere(scratch="")], source, target, RAY, Progress("x", stream=io.StringIO()))


def test_ray_refuses_gpus_that_are_not_here(run):
    import ray

    if ray.cluster_resources().get("GPU", 0):
        pytest.skip("this machine has a GPU")
    greedy = EngineConfig(engine="ray", workers=1, gpus_per_worker=1.0)
    with pytest.raises(ConfigError, match=r"gpus_per_worker=1, but Ray finds 0 GPUs"):
        run(PLAIN, greedy)


def test_ray_shows_no_gpu_to_workers_that_reserve_none(run, tmp_path):
    run([["plain"]], EngineConfig(engine="ray", workers=1), load="tell gpus")
    assert (tmp_path / "run" / "scratch" / "gpus").read_text() == "''"


def test_a_cluster_that_is_not_there_is_said_at_once():
    nowhere = EngineConfig(engine="ray", address="127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"cannot join Ray at 127.0.0.1:1: .*refused"):
        ray_cluster._start(nowhere)


def test_a_commit_that_the_driver_cannot_see_is_an_error(run, tmp_path):
    _, elsewhere, _ = run([["plain"]], LOCAL)
    commit = elsewhere.commit_of("000000")
    source = caption_step(str(tmp_path / "here"), [["plain"]])
    target = prompt_step(str(tmp_path / "here"), source, ObedientSpec(scratch=""))
    ledger = Ledger({"000000": 1}, target, LOCAL, Progress("prompts", stream=io.StringIO()))
    task = ledger.take()
    assert task == ShardTask(shard="000000", attempt=0)
    with pytest.raises(StorageError, match="a shared folder or an object store"):
        ledger.settle(task, Outcome(commit=commit))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("workers", 0, "workers must be at least 1"),
        ("workers", 2, "workers must be 1 with engine=local"),
        ("attempts", 0, "attempts must be at least 1"),
        ("cpus_per_worker", -1.0, "cpus_per_worker must be at least 0"),
        ("gpus_per_worker", 1.5, "gpus_per_worker above 1 must be a whole number"),
        ("shard_timeout_seconds", 0.0, "shard_timeout_seconds must be above 0"),
    ],
)
def test_values_out_of_range_are_refused(field, value, says):
    with pytest.raises(ValueError, match=says):
        EngineConfig(**{"engine": "local", field: value})
