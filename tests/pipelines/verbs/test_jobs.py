"""The builds on a cluster: listed and stopped."""

import json
import time
from types import SimpleNamespace

import pytest

from ovref.errors import ConfigError
from ovref.storage.file_store import Store
from ovref_pipelines import cli
from ovref_pipelines.live import Live

jobs = pytest.importorskip("ovref_pipelines.verbs.jobs")
from ray.job_submission import JobStatus  # noqa: E402 - after the check that it is installed

from ovref_pipelines.verbs import submit  # noqa: E402


class FakeCluster:
    """The calls of JobSubmissionClient that are needed; a stopped job drains for two looks."""

    def __init__(self):
        self.jobs, self.stopped, self.refuses = [], [], None

    def add(self, name, status, output=None, started=1000, ended=None, message=""):
        self.jobs.append(SimpleNamespace(
            submission_id=name, status=status, metadata={"output": output} if output else {},
            start_time=started, end_time=ended, message=message,
        ))  # fmt: skip

    def list_jobs(self):
        if self.refuses:
            raise RuntimeError(self.refuses)
        return self.jobs

    def stop_job(self, name):
        self.stopped.append(name)
        self.looks = 2

    def get_job_info(self, name):
        (found,) = [job for job in self.jobs if job.submission_id == name]
        self.looks -= 1
        if self.looks < 0:
            found.status = JobStatus.STOPPED
        return found


@pytest.fixture
def cluster(monkeypatch):
    made = FakeCluster()
    monkeypatch.setattr(submit, "connect", lambda address: made)
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.0)
    return made


def test_running_builds_are_listed_and_the_rest_with_all(cluster, tmp_path, capsys):
    live = Live(Store.open(str(tmp_path)))
    live.watch([{"step": "images", "records": 40, "records_done": 10, "seconds_to_go": 30.0,
                 "cost": None}])  # fmt: skip
    now = time.time() * 1000
    cluster.add("somebody-else", JobStatus.RUNNING)
    cluster.add(None, JobStatus.RUNNING)
    cluster.add("ovref-a-1", JobStatus.RUNNING, str(tmp_path), started=now - 90_000)
    cluster.add("ovref-b-1", JobStatus.PENDING, "s3://nowhere/b", started=None)
    cluster.add("ovref-c-1", JobStatus.FAILED, "/c", 1000, 61_000, "Traceback\nno GPU")
    assert cli.main(["jobs"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"ovref-a-1  running  2 min  {tmp_path}  images 10 of 40 records, 30 s to go",
        "ovref-b-1  pending  s3://nowhere/b",
    ]
    assert cli.main(["jobs", "--all"]) == 0
    assert "ovref-c-1  failed  60 s  /c  no GPU" in capsys.readouterr().out
    assert cli.main(["jobs", "--all", "--json"]) == 0
    told = {job["name"]: job for job in json.loads(capsys.readouterr().out)}
    assert told["ovref-c-1"]["seconds"] == 60 and told["ovref-b-1"]["status"] == "pending"


def test_a_cluster_without_builds_and_one_that_does_not_answer(cluster, capsys):
    assert cli.main(["jobs"]) == 0
    told = "the cluster knows no running job of ovref; --all shows the rest\n"
    assert capsys.readouterr().out == told
    cluster.refuses = "status code 500"
    assert cli.main(["jobs"]) == 2
    assert "does not list its jobs: status code 500" in capsys.readouterr().err


@pytest.mark.parametrize("named", ["ovref-a-1", "s3://bucket/a"])
def test_a_build_is_ended_by_its_name_or_its_output(cluster, capsys, named):
    cluster.add("ovref-a-1", JobStatus.RUNNING, "s3://bucket/a")
    cluster.add("ovref-b-1", JobStatus.RUNNING, "s3://bucket/b")
    assert cli.main(["cancel", named]) == 0
    assert cluster.stopped == ["ovref-a-1"]
    printed = capsys.readouterr()
    assert printed.out == "job ovref-a-1 stopped\n" and "finishes its shards" in printed.err
    assert cli.main(["cancel", "--detach", "ovref-b-1"]) == 0
    assert capsys.readouterr().out == "job ovref-b-1 was asked to stop\n"


def test_what_cannot_be_ended_is_said(cluster):
    cluster.add("ovref-a-1", JobStatus.SUCCEEDED, "s3://bucket/a")
    cluster.add("ovref-b-1", JobStatus.RUNNING, "s3://bucket/b")
    cluster.add("ovref-b-2", JobStatus.RUNNING, "s3://bucket/b")
    for named, says in (
        ("ovref-a-1", "has ended already: succeeded"),
        ("ovref-x", "no running job of ovref has the name or output ovref-x; found: ovref-b-1"),
        ("s3://bucket/b", "several jobs write to s3://bucket/b; found: ovref-b-1, ovref-b-2"),
    ):
        with pytest.raises(ConfigError, match=says):
            jobs.cancel(cluster, named)
    assert cluster.stopped == []
