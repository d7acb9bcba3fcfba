"""Where steps and workers are put: steps at the same time give the same bytes, and nobody starves.

The driver is the real one, on a stand-in for Ray (`fake_ray`) that runs in threads; one test each
runs on Ray itself.
"""

import dataclasses
import io
import os
import random
import signal
import threading
import time
from dataclasses import dataclass
from typing import ClassVar

import fsspec
import pytest
from fake_ray import ActorGone, Node
from pipeline_fakes import EchoSpec, ObedientSpec, caption_step, echo_step, files_of, prompt_step

from ovref_pipelines.engine.config import EngineConfig, PoolConfig
from ovref_pipelines.engine.ledger import JobError
from ovref_pipelines.engine.progress import Progress
from ovref_pipelines.engine.run_steps import StepRun, run_steps
from ovref_pipelines.engine.stopping import StoppedError

SHARDS = 12
TEXTS = [[f"plain {n} {m}" for m in range(3)] + [f"drop {n}"] for n in range(SHARDS)]


@dataclass(frozen=True, kw_only=True)
class Chaos:
    """A stage that dies by chance; for threads, not processes."""

    name: ClassVar[str] = "echo"
    version: ClassVar[int] = 1
    rng: random.Random
    probability: float

    def build(self):
        inner = EchoSpec().build()

        def stage(records):
            for record in inner(records):
                if self.rng.random() < self.probability:
                    raise ActorGone
                yield record

        return stage


def two_steps(folder, first=None, second=None, pools=None, texts=TEXTS):
    pools = pools or (PoolConfig(), PoolConfig())
    first, second = first or ObedientSpec(scratch=str(folder)), second or EchoSpec()
    captions = caption_step(str(folder), texts)
    prompts = prompt_step(str(folder), captions, ObedientSpec(scratch=""))
    echoes = echo_step(str(folder), prompts)
    return [
        StepRun(
            specs=[spec], source=source, target=target, pool=pool,
            progress=Progress(target.name, stream=io.StringIO(), every_seconds=1000),
        )
        for spec, source, target, pool in (
            (first, captions, prompts, pools[0]), (second, prompts, echoes, pools[1]),
        )
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The bytes of both steps, one after another in this process."""
    runs = two_steps(tmp_path_factory.mktemp("undisturbed"))
    run_steps(runs, EngineConfig(engine="local"))
    return [files_of(run.target) for run in runs]


def check(runs, undisturbed):
    for run, files in zip(runs, undisturbed, strict=True):
        assert run.target.complete() == [f"{n:06d}" for n in range(SHARDS)]
        assert files_of(run.target) == files


CHAINED = EngineConfig(placement="chained", workers=3)
POOLS = EngineConfig(placement="pools", workers=2, embedders=PoolConfig(workers=2), queue=2)


@pytest.mark.parametrize("config", [CHAINED, POOLS], ids=["chained", "pools"])
def test_steps_at_the_same_time_give_the_bytes_of_steps_one_after_another(
    config, on, tmp_path, undisturbed
):
    fake = on(a=Node(cpus=4))
    runs = two_steps(tmp_path, pools=(config.pool, config.embedders))
    first, second = run_steps(runs, config)
    assert (first.committed_now, second.committed_now) == (SHARDS, SHARDS)
    assert second.dropped == {} and first.dropped == {"asked_to_drop": SHARDS}
    check(runs, undisturbed)
    assert all(actor.dead for actor in fake.hired)


@pytest.mark.parametrize("queue", [1, 4])
@pytest.mark.parametrize("config", [CHAINED, POOLS], ids=["chained", "pools"])
def test_they_do_so_too_where_shards_are_fetched_ahead(config, queue, on, tmp_path, undisturbed):
    on(a=Node(cpus=4))
    memory = fsspec.filesystem("memory").store
    memory.clear()
    config = dataclasses.replace(config, queue=queue)
    runs = two_steps("memory://placement", pools=(config.pool, config.embedders))
    run_steps(runs, config)
    check(runs, undisturbed)
    memory.clear()


@pytest.mark.slow
@pytest.mark.parametrize("config", [CHAINED, POOLS], ids=["chained", "pools"])
def test_ray_itself_gives_them_too(config, local_ray, tmp_path, undisturbed):
    runs = two_steps(tmp_path)
    run_steps(runs, config)
    check(runs, undisturbed)


def test_a_chained_worker_embeds_what_it_has_generated_before_it_generates_more(on, tmp_path):
    fake = on(a=Node(cpus=1))
    runs = two_steps(tmp_path)
    run_steps(runs, EngineConfig(placement="chained", workers=1))
    (actor,) = fake.hired
    given = [arguments[0] for name, arguments in actor.calls if name == "run"]
    assert given == [0, 1] * SHARDS


def test_drawing_pauses_when_too_much_waits_for_embedders(on, tmp_path, undisturbed, monkeypatch):
    on(a=Node(cpus=4))
    most = 0

    class Slow(EchoSpec):
        def build(self):
            stage = super().build()

            def slow(records):
                nonlocal most
                generated, embedded = (len(run.target.committed()) for run in runs)
                most = max(most, generated - embedded)
                time.sleep(0.03)
                yield from stage(records)

            return slow

    config = EngineConfig(placement="pools", workers=2, queue=2)
    runs = two_steps(tmp_path, second=Slow(), pools=(config.pool, config.embedders))
    run_steps(runs, config)
    check(runs, undisturbed)
    # Two wait, one is embedded, and each of the two that generate may add the shard it has in hand.
    assert 3 <= most <= 5


def test_what_an_earlier_run_has_generated_is_embedded_first(on, tmp_path, undisturbed):
    runs = two_steps(tmp_path)
    run_steps(runs[:1], EngineConfig(engine="local"))
    on(a=Node(cpus=4))
    runs = two_steps(tmp_path, pools=(POOLS.pool, POOLS.embedders))
    first, second = run_steps(runs, POOLS)
    assert (first.committed_now, second.committed_now) == (0, SHARDS)
    check(runs, undisturbed)


def test_embedders_on_cpus_leave_the_generators_the_cpus_that_their_gpus_need(on, tmp_path):
    # Two nodes, each with a GPU and one CPU; nothing but a third is for embedders. The second GPU
    # comes late, and its only CPU must still be there.
    fake = on(a=Node(cpus=1, gpus=1), b=Node(cpus=1, gpus=1, alive=False), c=Node(cpus=1))
    config = EngineConfig(
        placement="pools", workers=2, gpus_per_worker=1.0, embedders=PoolConfig(workers=3)
    )

    class Late(EchoSpec):
        def build(self):
            fake.nodes_by_name["b"].alive = True
            stage = super().build()

            def slow(records):
                time.sleep(0.02)
                yield from stage(records)

            return slow

    runs = two_steps(tmp_path, second=Late(), pools=(config.pool, config.embedders))
    run_steps(runs, config)
    generators = [actor for actor in fake.hired if actor.options["num_gpus"]]
    assert {actor.node_name for actor in generators} == {"a", "b"}
    first_embedder = next(actor for actor in fake.hired if not actor.options["num_gpus"])
    assert first_embedder.node_name == "c"


def test_two_fractions_share_a_gpu(on, tmp_path, undisturbed):
    fake = on(a=Node(cpus=4, gpus=1))
    config = EngineConfig(placement="chained", workers=2, gpus_per_worker=0.5)
    runs = two_steps(tmp_path, pools=(config.pool, config.pool))
    run_steps(runs, config)
    assert [actor.options["num_gpus"] for actor in fake.hired] == [0.5, 0.5]
    check(runs, undisturbed)


class Builds:
    """A stage whose models take as long to load as `load(number of this worker)` does."""

    def __init__(self, load):
        self.begun = self.done = 0
        self._load, self._lock = load, threading.Lock()

    def spec(self, folder):
        builds = self

        class Loading(ObedientSpec):
            def build(self):
                with builds._lock:
                    builds.begun += 1
                    number = builds.begun
                builds._load(number)
                builds.done += 1
                return super().build()

        return Loading(scratch=str(folder))


def test_nobody_waits_for_workers_that_nothing_is_left_for(on, tmp_path, undisturbed):
    over = threading.Event()
    builds = Builds(lambda number: number == 1 or over.wait(20))
    fake = on(a=Node(cpus=2))  # of three workers two have a place, and one of these never loads
    pool = PoolConfig(workers=3)
    (run, _) = two_steps(tmp_path, first=builds.spec(tmp_path), pools=(pool, pool))
    run_steps([run], EngineConfig(workers=3))
    assert not over.is_set() and builds.done == 1
    over.set()
    assert files_of(run.target) == undisturbed[0]
    assert len(fake.hired) == 3 and all(actor.dead for actor in fake.hired)


def test_a_worker_that_hangs_while_it_loads_is_replaced(on, tmp_path, undisturbed):
    over = threading.Event()
    builds = Builds(lambda number: number > 1 or over.wait(20))
    on(a=Node(cpus=1))
    (run, _) = two_steps(tmp_path, first=builds.spec(tmp_path))
    (summary,) = run_steps([run], EngineConfig(workers=1, shard_timeout_seconds=1.0))
    over.set()
    assert summary.trouble == {"start_deaths": 1} and files_of(run.target) == undisturbed[0]
    assert "loaded its models, hiring another: it took longer than shard_timeout_seconds=1" in (
        run.progress._stream.getvalue()
    )


def test_workers_that_all_hang_while_they_load_end_the_job(on, tmp_path):
    over = threading.Event()
    builds = Builds(lambda number: over.wait(20))
    on(a=Node(cpus=1))
    (run, _) = two_steps(tmp_path, first=builds.spec(tmp_path))
    with pytest.raises(JobError, match=r"4 workers in a row .*longer than shard_timeout_seconds"):
        run_steps([run], EngineConfig(workers=1, shard_timeout_seconds=0.05))
    over.set()


def test_a_place_may_be_waited_for_longer_than_a_shard_may_take(on, tmp_path, undisturbed):
    fake = on(a=Node(cpus=1, alive=False))
    (run, _) = two_steps(tmp_path)
    threading.Timer(1.3, lambda: setattr(fake.nodes_by_name["a"], "alive", True)).start()
    (summary,) = run_steps([run], EngineConfig(workers=1, shard_timeout_seconds=1.0))
    assert summary.trouble == {} and files_of(run.target) == undisturbed[0]
    assert len(fake.hired) == 1


def test_workers_on_a_leaving_node_finish_what_they_have_and_get_nothing_more(
    on, tmp_path, undisturbed
):
    fake = on(a=Node(cpus=1), b=Node(cpus=1))
    begun, noticed = threading.Event(), threading.Event()

    class Noticed(ObedientSpec):
        def build(self):
            stage = super().build()

            def slow(records):
                here = fake.current.actor.node_name
                if here == "a" and not begun.is_set():
                    begun.set()
                    fake.nodes_by_name["a"].leaving = True
                    noticed.wait(0.3)
                yield from stage(records)

            return slow

    runs = two_steps(tmp_path, first=Noticed(scratch=str(tmp_path)))
    config = EngineConfig(workers=2)
    (summary,) = run_steps(runs[:1], config)
    assert summary.trouble == {} and files_of(runs[0].target) == undisturbed[0]
    on_a = [actor for actor in fake.hired if actor.node_name == "a"]
    assert [name for actor in on_a for name, _ in actor.calls] == ["where", "load", "run"]
    assert "is about to be lost: its 1 workers finish" in runs[0].progress._stream.getvalue()


def test_a_worker_that_has_grown_is_replaced(on, tmp_path, undisturbed):
    fake = on(a=Node(cpus=2))
    # Whatever this process has is more than a kilobyte: a new worker for each shard.
    runs = two_steps(tmp_path)
    (summary,) = run_steps(runs[:1], EngineConfig(workers=2, max_worker_gb=1e-6))
    assert summary.trouble == {} and files_of(runs[0].target) == undisturbed[0]
    assert len(fake.hired) == SHARDS
    assert "more than max_worker_gb=1e-06" in runs[0].progress._stream.getvalue()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("config", [CHAINED, POOLS], ids=["chained", "pools"])
def test_workers_and_nodes_that_are_lost_by_chance_cost_nothing_but_time(
    config, seed, on, tmp_path, undisturbed, monkeypatch
):
    # Here deaths are chance, and no record shall be held to be the cause.
    monkeypatch.setattr("ovref_pipelines.engine.ledger.MAX_WORKER_DEATHS", 1000)
    monkeypatch.setattr("ovref_pipelines.engine.ledger.CONVICTING_DEATHS", 1000)
    rng = random.Random(seed)
    fake = on(a=Node(cpus=2), b=Node(cpus=2), c=Node(cpus=1))
    chaos = Chaos(rng=rng, probability=0.05)
    runs = two_steps(tmp_path, second=chaos, pools=(config.pool, config.embedders))
    threading.Timer(rng.uniform(0, 0.2), fake.kill_node, ["a"]).start()
    summaries = run_steps(runs, config)
    assert all(summary.quarantined == () for summary in summaries)
    assert all("crashed_records" not in summary.trouble for summary in summaries)
    check(runs, undisturbed)


def test_a_drain_lets_shards_in_hand_finish_and_nothing_is_begun(on, tmp_path):
    on(a=Node(cpus=2))

    class Signals(ObedientSpec):
        def build(self):
            stage = super().build()

            def slow(records):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
                yield from stage(records)

            return slow

    runs = two_steps(tmp_path, first=Signals(scratch=str(tmp_path)))
    with pytest.raises(StoppedError, match="stopped as asked"):
        run_steps(runs, EngineConfig(placement="chained", workers=1))
    assert [len(run.target.committed()) for run in runs] == [1, 0]


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Notes for every shard how many tasks its worker has got that it has not yet begun; dies
    where it is asked to, once."""

    name: ClassVar[str] = "obedient"
    version: ClassVar[int] = 1
    fake: object
    ahead: list[int]
    deaths: list[str]
    die_at: str = ""

    def build(self):
        inner, begun = ObedientSpec(scratch="").build(), []

        def stage(records):
            begun.append(1)
            actor = self.fake.current.actor
            # The driver may be in the midst of telling it.
            deadline = time.monotonic() + 0.1
            while time.monotonic() < deadline and self._given(actor) == len(begun):
                time.sleep(0.001)
            self.ahead.append(self._given(actor) - len(begun))
            for record in inner(records):
                caption = getattr(record, "caption", "")  # of a Dropped
                if self.die_at and caption.startswith(self.die_at) and not self.deaths:
                    self.deaths.append(record.key)
                    raise ActorGone
                yield record

        return stage

    @staticmethod
    def _given(actor):
        return sum(name == "run" for name, _ in actor.calls)


def watched_run(folder, fake, config, **fields):
    """(summary, files, tasks that each shard had waiting behind it)."""
    watched = Watched(fake=fake, ahead=[], deaths=[], **fields)
    run, _ = two_steps(folder, first=watched)
    (summary,) = run_steps([run], config)
    assert run.target.complete() == [f"{n:06d}" for n in range(SHARDS)]
    return summary, files_of(run.target), watched.ahead


def test_local_shards_are_given_one_at_a_time(on, tmp_path, undisturbed):
    _, files, ahead = watched_run(tmp_path, on(a=Node(cpus=1)), EngineConfig(workers=1))
    assert files == undisturbed[0] and set(ahead) == {0}


@pytest.mark.parametrize("shard", range(SHARDS))
def test_the_shard_of_a_worker_that_dies_is_given_to_another(on, tmp_path, undisturbed, shard):
    summary, files, _ = watched_run(
        tmp_path, on(a=Node(cpus=2)), EngineConfig(workers=2), die_at=f"plain {shard} 1"
    )
    assert files == undisturbed[0] and summary.trouble == {"worker_deaths": 1}
