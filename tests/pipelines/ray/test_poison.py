"""A record that kills its worker: found, left out and counted; made again once the fault is mended.

The driver is the real one; but for the first test it is on a stand-in for Ray (`fake_ray`), where
a stage that raises `ActorGone` is what one that crashes is to Ray.
"""

import dataclasses
import io
import json
import threading

import pytest
from fake_ray import ActorGone, Node
from pipeline_fakes import ObedientSpec, caption_step, files_of, prompt_step

from ovref_pipelines.engine.config import EngineConfig
from ovref_pipelines.engine.ledger import (
    CRASHED,
    CRASHED_WORKER,
    MAX_WORKER_DEATHS,
    SUSPECT_DEATHS,
    JobError,
)
from ovref_pipelines.engine.progress import Progress
from ovref_pipelines.engine.run_steps import run_step

TEXTS = [["plain 0", "plain 1"], ["plain 2", "die always", "drop 3", "plain 4"], ["plain 5"]]
LOCAL = EngineConfig(engine="local")


class MortalSpec(ObedientSpec):
    """Takes its actor down, not the process of the test; in the thread of an actor alone."""

    def build(self):
        alive = dataclasses.replace(self, mended="yes")
        stage = ObedientSpec.build(alive)
        mended, here = self.mended, threading.local()

        def mortal(records):
            def checked():
                for record in records:
                    if record.text.startswith("die") and mended == "no":
                        raise ActorGone
                    if record.text.startswith("together"):
                        here.met = getattr(here, "met", 0) + 1
                        if here.met == 2:
                            raise ActorGone
                    yield record

            yield from stage(checked())
            here.met = 0

        return mortal


def run(folder, texts, config, spec_class=MortalSpec, **fields):
    """(summary, target, what was printed)."""
    folder.mkdir(exist_ok=True)
    source = caption_step(str(folder), texts)
    spec = spec_class(scratch=str(folder), **fields)
    target = prompt_step(str(folder), source, ObedientSpec(scratch=""))
    printed = io.StringIO()
    progress = Progress("prompts", stream=printed, every_seconds=1000)
    return run_step([spec], source, target, config, progress), target, printed.getvalue()


@pytest.fixture
def spared(tmp_path):
    """The bytes where the stage itself drops what kills it."""
    _, target, _ = run(tmp_path / "spared", TEXTS, LOCAL, ObedientSpec, mended="drop")
    return files_of(target)


def check(summary, target, printed, spared):
    assert summary.quarantined == () and target.complete() == ["000000", "000001", "000002"]
    assert summary.dropped == {CRASHED_WORKER: 1, "asked_to_drop": 1}
    assert summary.inputs == 7 == summary.outputs + sum(summary.dropped.values())
    assert files_of(target) == spared
    # Two deaths of the shard, two of the record alone.
    assert summary.trouble == {"crashed_records": 1, "worker_deaths": 4}
    assert "record 1 of shard 000001 kills its worker even alone" in printed
    (crashed,) = json.loads(target.store.read(f"{CRASHED}/000001.json"))["records"]
    assert crashed["number"] == 1 and "its worker died" in crashed["reason"]


def test_ray_finds_the_record_leaves_it_out_and_makes_everything_else(local_ray, tmp_path, spared):
    config = EngineConfig(engine="ray", workers=2)
    check(*run(tmp_path / "ray", TEXTS, config, ObedientSpec), spared)


def test_the_record_is_found_left_out_and_everything_else_is_made(on, tmp_path, spared):
    on(a=Node(cpus=2))
    check(*run(tmp_path / "run", TEXTS, EngineConfig(workers=2)), spared)


def test_several_such_records_first_and_last(on, tmp_path):
    on(a=Node(cpus=2))
    texts = [["die a", "plain", "die b", "die c"], ["die d"]]
    summary, target, _ = run(tmp_path, texts, EngineConfig(workers=2))
    assert summary.dropped == {CRASHED_WORKER: 4} and summary.outputs == 1
    _, other, _ = run(tmp_path / "spared", texts, LOCAL, ObedientSpec, mended="drop")
    assert files_of(target) == files_of(other)


def test_a_shard_that_kills_only_as_a_whole_is_quarantined(on, tmp_path):
    on(a=Node(cpus=1))
    texts = [["plain"], ["together 1", "together 2", "plain"]]
    summary, _, printed = run(tmp_path, texts, EngineConfig(workers=1))
    assert summary.quarantined == ("000001",) and summary.dropped == {}
    assert "no record of shard 000001 kills its worker when run alone" in printed
    assert summary.trouble == {"worker_deaths": SUSPECT_DEATHS + MAX_WORKER_DEATHS}


def test_a_single_death_is_not_held_against_a_record(on, tmp_path):
    on(a=Node(cpus=1))
    deaths = []

    class Unlucky(MortalSpec):
        """Dies while `plain 1` is run, three times: twice in the shard, once alone."""

        def build(self):
            stage = super().build()

            def unlucky(records):
                def checked():
                    for record in records:
                        if record.text == "plain 1" and len(deaths) < 3:
                            deaths.append(1)
                            raise ActorGone
                        yield record

                yield from stage(checked())

            return unlucky

    texts = [["plain 0", "plain 1", "plain 2"]]
    summary, target, _ = run(tmp_path / "unlucky", texts, EngineConfig(workers=1), Unlucky)
    assert summary.dropped == {} and len(deaths) == 3
    _, other, _ = run(tmp_path / "lucky", texts, LOCAL)
    assert files_of(target) == files_of(other)


def test_an_error_of_a_record_alone_is_left_to_the_shard(on, tmp_path):
    on(a=Node(cpus=1))
    summary, _, _ = run(tmp_path, [["raise x", "die y"]], EngineConfig(workers=1, attempts=1))
    # Alone each is looked at; in the shard `raise x` comes first.
    assert summary.quarantined == ("000000",) and summary.trouble["errors"] == 1


def test_too_many_such_records_end_the_job(on, tmp_path):
    on(a=Node(cpus=2))
    texts = [[f"die {n}" for n in range(4)]]
    with pytest.raises(JobError, match=r"0 shards and 3 records of prompts failed permanently"):
        run(tmp_path, texts, EngineConfig(workers=1, max_quarantined=2))


def test_what_was_left_out_is_made_again_when_it_is_taken_back(on, tmp_path):
    on(a=Node(cpus=2))
    config = EngineConfig(workers=2)
    _, target, _ = run(tmp_path / "run", TEXTS, config)
    target.take_back(["000001"])
    assert target.committed() == ["000000", "000002"] and target.complete() is None
    summary, target, _ = run(tmp_path / "run", TEXTS, config, mended="yes")
    assert summary.committed_now == 1 and summary.dropped == {"asked_to_drop": 1}
    assert not target.store.list(CRASHED)
    _, other, _ = run(tmp_path / "fine", TEXTS, LOCAL, ObedientSpec, mended="yes")
    assert files_of(target) == files_of(other) and target.complete() == other.complete()
