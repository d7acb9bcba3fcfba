"""A Ray of several nodes on this machine: a head without CPUs and workers that come and go.

Nodes are killed, and drained as a cloud drains a spot machine; a job is submitted to the head.
"""

import io
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pipeline_fakes import files_of, slow_job

from ovref_pipelines.engine.config import EngineConfig
from ovref_pipelines.engine.progress import Progress
from ovref_pipelines.engine.run_steps import run_step

pytestmark = pytest.mark.slow

SHARDS = 240
"""Each takes 50 ms: together more than one worker can do while another is started."""


@pytest.fixture
def cluster(monkeypatch):
    """A head that takes no work and two workers of one CPU each; this process has joined it."""
    import ray
    from ray.cluster_utils import Cluster

    if ray.is_initialized():  # by another test of the session
        ray.shutdown()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")  # 10 s would outlast the job
    made = Cluster()
    small = {"object_store_memory": 80 << 20}
    made.add_node(num_cpus=0, include_dashboard=True, dashboard_port=0, **small)
    workers = [made.add_node(num_cpus=1, **small) for _ in range(2)]
    made.wait_for_nodes()
    ray.init(made.address, log_to_driver=False, logging_level="ERROR")
    yield made, workers
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    spec, source, target = slow_job(str(tmp_path_factory.mktemp("undisturbed")), SHARDS)
    run_step([spec], source, target, EngineConfig(engine="local"))
    return files_of(target)


class Watched(Progress):
    workers = 0

    def update_state(self, shards_waiting, workers):
        self.workers = workers
        super().update_state(shards_waiting, workers)


def drain(cluster, node):
    """What a cloud does some time before it takes a spot machine back."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    accepted, why = GcsClient(address=cluster.address).drain_node(
        node.node_id,
        DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "the spot machine is wanted back",
        int((time.time() + 600) * 1000),
    )
    assert accepted, why


def test_nodes_that_are_killed_or_drained_cost_nothing_but_time(
    cluster, tmp_path, undisturbed, monkeypatch
):
    monkeypatch.setattr("ovref_pipelines.ray.engine.NOTICE_SECONDS", 0.1)
    made, (first, second) = cluster
    spec, source, target = slow_job(str(tmp_path), SHARDS)
    config = EngineConfig(address=made.address, workers=2)
    said = io.StringIO()
    progress = Watched("prompts", every_seconds=1000, stream=said)
    # Nodes can be added by the main thread alone.
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_step, [spec], source, target, config, progress)

        def wait_until(condition):
            while not condition():
                assert not running.done(), said.getvalue()
                time.sleep(0.05)

        wait_until(lambda: progress.workers == 2)
        drain(made, second)
        wait_until(lambda: f"node {second.node_id[:12]} is about to be lost" in said.getvalue())
        made.remove_node(first, allow_graceful=False)
        made.add_node(num_cpus=1, object_store_memory=80 << 20)
        summary = running.result()
    assert summary.committed == SHARDS and summary.quarantined == ()
    assert summary.trouble == {"node_losses": 1}
    assert files_of(target) == undisturbed
    assert "its node was lost" in said.getvalue()


def test_a_submitted_job_runs_on_the_workers_and_its_metrics_can_be_scraped(
    cluster, tmp_path, undisturbed
):
    from ray.job_submission import JobStatus, JobSubmissionClient

    made, _ = cluster
    client = JobSubmissionClient(f"http://{made.head_node.webui_url}")
    folder = Path(__file__).parents[1]
    job = client.submit_job(
        entrypoint=f"{sys.executable} -m pipeline_fakes {tmp_path} {SHARDS} ray 0 999999 0",
        runtime_env={"env_vars": {"PYTHONPATH": str(folder), "RAY_AUTH_MODE": "disabled"}},
    )
    scraped = set()
    while not client.get_job_status(job).is_terminal():
        scraped |= metrics_of_all_nodes()
        time.sleep(1)
    assert client.get_job_status(job) == JobStatus.SUCCEEDED, client.get_job_logs(job)
    _, _, target = slow_job(str(tmp_path), SHARDS)
    assert files_of(target) == undisturbed
    assert {name for name in scraped if name.startswith("ray_ovref_")} >= {
        "ray_ovref_shards_waiting", "ray_ovref_workers", "ray_ovref_output_records_total",
    }  # fmt: skip


def metrics_of_all_nodes():
    import ray

    names = set()
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                lines = answer.read().decode().splitlines()
        except OSError:  # its agent is not up yet
            continue
        names |= {line.partition("{")[0] for line in lines if not line.startswith("#")}
    return names
