"""Workers report their progress within a shard, in this process and on Ray."""

import io
import sys
import threading
import time
import types

import pytest
from pipeline_fakes import ObedientSpec, caption_step, prompt_step

from ovref_pipelines.engine.config import EngineConfig
from ovref_pipelines.engine.progress import Progress
from ovref_pipelines.engine.reports import Report, gpu, reporting
from ovref_pipelines.engine.run_steps import run_step


def test_reports_come_while_the_work_is_silent_and_end_with_it():
    told, twice = [], threading.Event()

    def tell(report):
        told.append(report)
        if len(told) > 1:
            twice.set()

    with reporting(tell, "000000", every_seconds=0.01) as watch:
        watch(3, 1)
        assert twice.wait(10)
    count = len(told)
    assert Report(shard="000000", done=3, dropped=1) in told
    time.sleep(0.05)
    assert len(told) == count


def test_what_cannot_be_told_does_not_stop_the_work(caplog):
    failed = threading.Event()

    def tell(report):
        failed.set()
        raise ConnectionError("nobody listens")

    with reporting(tell, "000000", every_seconds=0.01):
        assert failed.wait(10)
    assert "progress of shard 000000 cannot be reported: nobody listens" in caplog.text


@pytest.mark.parametrize("busy", [0.5, None])
def test_memory_and_use_of_a_gpu_are_told(monkeypatch, busy):
    def utilization():
        if busy is None:
            raise ModuleNotFoundError("pynvml does not seem to be installed")
        return int(busy * 100)

    cuda = types.SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True,
        mem_get_info=lambda: (3, 10), utilization=utilization,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    assert gpu() == {"gpu_used_bytes": 7, "gpu_total_bytes": 10, "gpu_busy": busy}
    cuda.is_initialized = lambda: False  # a process that does not use it must not begin to
    assert gpu() == {}


class Watched(Progress):
    """Keeps the reports."""

    def __init__(self):
        super().__init__("prompts", stream=io.StringIO(), every_seconds=1000)
        self.seen = []

    def report(self, report):
        super().report(report)
        self.seen.append((report, self.counts()["records_done"]))


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_records_are_told_before_their_shard_is_done(engine, tmp_path, monkeypatch, request):
    if engine == "ray":
        request.getfixturevalue("local_ray")
        monkeypatch.setattr("ovref_pipelines.ray.reports.REPORT_SECONDS", 0.1)
    else:
        monkeypatch.setattr("ovref_pipelines.engine.reports.REPORT_SECONDS", 0.1)
    records = 300 if engine == "local" else 600  # at 10 ms each; Ray's workers tell every 2 s
    shards = [[f"slow {n}" for n in range(records)]]
    source = caption_step(str(tmp_path), shards)
    spec = ObedientSpec(scratch=str(tmp_path))
    progress = Watched()
    target = prompt_step(str(tmp_path), source, spec)
    run_step([spec], source, target, EngineConfig(engine=engine), progress)
    counts = [done for _, done in progress.seen]
    assert counts and counts == sorted(counts) and 0 < counts[0] < records
    assert progress.counts()["records_done"] == progress.counts()["records"] == records
