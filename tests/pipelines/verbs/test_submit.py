"""Builds as jobs: submission, refusals and reports; then on a real head with a dashboard."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from ovref.config import dump, load
from ovref.corpora import CorpusSpec
from ovref.errors import ConfigError
from ovref.stages.embed import Embed
from ovref.stages.synthesize import Synthesize
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_pipelines import cli
from ovref_pipelines.engine.config import EngineConfig
from ovref_pipelines.recipe import BuildConfig
from shipped_configs import BUILDS

submit = pytest.importorskip("ovref_pipelines.verbs.submit")
import ray  # noqa: E402 - after the check that it is installed
from job_server import JobServer  # noqa: E402
from ray.job_submission import JobStatus  # noqa: E402

ROOT = Path(__file__).parents[3]

CONFIG = BuildConfig(
    output="s3://bucket/Größe 'n' more/first_run/",
    corpus=CorpusSpec(path="/data/captions.txt", corpus_id="naïve #1"),
    synthesize=Synthesize(model="fake", min_area=0.00001, negative_prompt="it's $HOME `x` \\ 'n'"),
    embed=Embed(visual=VisualEncoderConfig(model="fake"), text=TextEncoderConfig(model="fake")),
    engine=EngineConfig(engine="ray", workers=3, address="auto", drain_seconds=7.5),
)


def changed(**changes):
    return dataclasses.replace(CONFIG, **changes)


class FakeCluster:
    """The five calls of JobSubmissionClient, and jobs that end as configured."""

    def __init__(self):
        self.jobs = []
        self.sent = {}
        self.log = ""
        self.cuts = []
        """Where connections to the log break, one after another."""
        self.refuses = None
        self.starting = 0
        """Times that it answers as a head without an agent does."""

    def list_jobs(self):
        driver = SimpleNamespace(submission_id=None, status=JobStatus.RUNNING)
        return [driver, *self.jobs]

    def submit_job(self, *, submission_id, **sent):
        if self.starting:
            self.starting -= 1
            raise RuntimeError(
                "status code 500: No available agent to submit job, please try again"
            )
        if self.refuses:
            raise RuntimeError(self.refuses)
        if any(job.submission_id == submission_id for job in self.jobs):
            raise RuntimeError(f"{submission_id} is there already")
        self.add(submission_id, JobStatus.PENDING)
        self.sent = sent
        return submission_id

    def add(self, job, status, code=None):
        details = SimpleNamespace(
            submission_id=job, status=status, driver_exit_code=code, message="the message"
        )
        self.jobs.append(details)

    def get_job_info(self, job):
        for details in self.jobs:
            if details.submission_id == job:
                return details
        raise RuntimeError(f"Job {job} does not exist")

    async def tail_job_logs(self, job):
        cut = self.cuts.pop(0) if self.cuts else None
        text = self.log[:cut]
        for start in range(0, len(text), 7):
            yield text[start : start + 7]
        if cut is not None:
            raise RuntimeError("WebSocket connection closed unexpectedly")


@pytest.fixture
def cluster():
    return FakeCluster()


# -- what is sent ------------------------------------------------------------------------------


def test_the_command_holds_the_whole_configuration(tmp_path):
    # The shell gives the here-document to a program that is called ovref, and that keeps it.
    tool = tmp_path / "ovref"
    tool.write_text('#!/bin/sh\necho "$@" > "$0.arguments"\ncat "$3" > "$0.yaml"\n')
    tool.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    command = submit.entrypoint(CONFIG)
    subprocess.run(command, shell=True, check=True, env={**os.environ, "PATH": path})
    assert (tmp_path / "ovref.arguments").read_text() == "build --config /dev/stdin\n"
    engine = dataclasses.replace(CONFIG.engine, address=None)
    assert load(BuildConfig, tmp_path / "ovref.yaml") == changed(engine=engine)
    options = cli.parser().parse_args(shlex.split(command.partition("<<")[0])[1:])
    assert (options.verb, options.config) == ("build", "/dev/stdin")


@pytest.mark.parametrize("path", BUILDS, ids=lambda path: path.stem)
def test_every_shipped_build_survives_the_way(path, tmp_path):
    overrides = ["output=/o", "corpus.path=/c", "engine.engine=ray"]
    config = load(BuildConfig, path, overrides)
    _, _, text = submit.entrypoint(config).partition("\n")
    (tmp_path / "sent.yaml").write_text(text.rpartition(submit.END)[0])
    assert load(BuildConfig, tmp_path / "sent.yaml") == config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"engine": EngineConfig(engine="local")}, r"engine\.engine is local"),
        ({"output": "runs/first"}, r"output=runs/first"),
        ({"corpus": CorpusSpec(path="captions.txt")}, r"corpus\.path=captions\.txt"),
        ({"collection": "c", "base": "../b"}, r"collection=c, base=\.\./b"),
        ({"images_from": "./i", "work": "w"}, r"images_from=\./i, work=w"),
    ],
)
def test_what_would_not_run_there_is_not_sent(cluster, changes, says):
    with pytest.raises(ConfigError, match=says):
        submit.submit(cluster, changed(**changes))
    assert cluster.jobs == []


def test_the_name_is_of_output_and_settings_alone():
    name = submit.job_name(CONFIG)
    assert name.startswith("ovref-first-run-")
    same = [
        {"engine": EngineConfig(engine="local")}, {"work": "/scratch"}, {"replace": True},
        {"allow_incomplete": True},
    ]  # fmt: skip
    other = [
        {"output": "s3://bucket/second"}, {"shard_size": 7}, {"collection": "s3://bucket/c"},
        {"synthesize": Synthesize(model="other")}, {"licences": ("MIT",)},
    ]  # fmt: skip
    assert {submit.job_name(changed(**changes)) for changes in same} == {name}
    names = {submit.job_name(changed(**changes)) for changes in other}
    assert len(names) == len(other) and name not in names
    odd = submit.job_name(changed(output="/ÄÖ/" + "x" * 99))
    assert len(odd) < 60


def test_the_runtime_environment_is_sent_with_time_to_stop(cluster):
    environment = {"env_vars": {"A": "1"}, "config": {"setup_timeout_seconds": 5}}
    job = submit.submit(cluster, CONFIG, environment)
    assert job == submit.job_name(CONFIG)
    assert cluster.sent["entrypoint"] == submit.entrypoint(CONFIG)
    assert cluster.sent["metadata"] == {"output": CONFIG.output}
    assert cluster.sent["runtime_env"] == {
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "18", "A": "1"},
        "config": {"setup_timeout_seconds": 5},
    }
    assert environment["env_vars"] == {"A": "1"}


@pytest.mark.parametrize("text", [None, "- a list", "env_vars: {A: 1}", "{cut o", "pip: {nope: 1}"])
def test_what_is_no_runtime_environment_is_said(tmp_path, text):
    path = tmp_path / "env.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"env\.yaml is no runtime environment"):
        submit.read_runtime_env(str(path))


def test_a_runtime_environment_is_read():
    path = ROOT / "cluster" / "runtime_env.yaml"
    assert submit.read_runtime_env(str(path)) == yaml.safe_load(path.read_text())
    assert submit.read_runtime_env(None) == {}


# -- twice -------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [JobStatus.PENDING, JobStatus.RUNNING])
def test_a_running_build_is_not_started_twice(cluster, status):
    job = submit.submit(cluster, CONFIG)
    cluster.jobs[0].status = status
    for again in (False, True):
        with pytest.raises(ConfigError, match=rf"{status.value.lower()} already, as job {job}:"):
            submit.submit(cluster, changed(replace=True), again=again)
    assert len(cluster.jobs) == 1
    submit.submit(cluster, changed(shard_size=7))  # another build
    assert len(cluster.jobs) == 2


@pytest.mark.parametrize("status", [JobStatus.FAILED, JobStatus.STOPPED])
def test_a_failed_or_stopped_one_is_submitted_again_with_a_number(cluster, status):
    name = submit.submit(cluster, CONFIG)
    cluster.jobs[0].status = status
    assert submit.submit(cluster, CONFIG) == f"{name}-2"
    cluster.add(f"{name}-10", status)
    cluster.jobs[1].status = status
    cluster.jobs.sort(key=lambda details: details.submission_id)  # -10 before -2
    assert submit.submit(cluster, CONFIG) == f"{name}-11"
    assert submit.latest(cluster, CONFIG) == f"{name}-11"


def test_one_that_has_succeeded_needs_to_be_asked_for(cluster):
    job = submit.submit(cluster, CONFIG)
    cluster.jobs[0].status = JobStatus.SUCCEEDED
    with pytest.raises(ConfigError, match=f"succeeded already, as job {job}; --again"):
        submit.submit(cluster, CONFIG)
    assert submit.submit(cluster, CONFIG, again=True) == f"{job}-2"


def test_two_senders_at_the_same_moment(cluster, monkeypatch):
    job = submit.submit(cluster, CONFIG)
    there, cluster.jobs = cluster.jobs, []
    lists = iter([[], there])
    monkeypatch.setattr(cluster, "list_jobs", lambda: next(lists))
    cluster.refuses = "there already"
    with pytest.raises(ConfigError, match=f"by someone else, as job {job}"):
        submit.submit(cluster, CONFIG)


def test_a_cluster_that_refuses_is_quoted(cluster):
    cluster.refuses = "status code 400: bad runtime_env"
    with pytest.raises(ConfigError, match="refuses the job: status code 400: bad runtime_env"):
        submit.submit(cluster, CONFIG)


def test_a_head_that_has_just_started_is_waited_for(cluster, monkeypatch):
    monkeypatch.setattr(submit, "AGENT_RETRY_SECONDS", 0)
    cluster.starting = 3
    said = []
    job = submit.submit(cluster, CONFIG, say=said.append)
    assert [details.submission_id for details in cluster.jobs] == [job]
    assert said == [
        "ovref: the cluster's head has no agent yet that could start the job; retrying for 120 s"
    ]


def test_it_is_not_waited_for_without_end_nor_is_anything_else(cluster, monkeypatch):
    monkeypatch.setattr(submit, "AGENT_RETRY_SECONDS", 0)
    cluster.refuses, cluster.starting = "status code 400: bad runtime_env", 1
    with pytest.raises(ConfigError, match="refuses the job: status code 400: bad runtime_env"):
        submit.submit(cluster, CONFIG)
    monkeypatch.setattr(submit, "AGENT_SECONDS", 0)
    cluster.starting = 2
    with pytest.raises(ConfigError, match=r"refuses the job: .*No available agent"):
        submit.submit(cluster, CONFIG)
    assert cluster.starting == 1


def test_there_must_be_a_job_to_attach_to(cluster):
    cluster.add(submit.job_name(CONFIG) + "-x", JobStatus.RUNNING)
    with pytest.raises(ConfigError, match="knows no job of this build"):
        submit.latest(cluster, CONFIG)


def test_no_cluster_is_one_message(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:2")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:3")
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:1.*give --address"):
        submit.connect("http://127.0.0.1:1")


# -- following ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "gives"),
    [
        (JobStatus.SUCCEEDED, 0, 0), (JobStatus.FAILED, 1, 1), (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, 130, 130), (JobStatus.FAILED, -9, 1), (JobStatus.FAILED, None, 1),
        (JobStatus.STOPPED, None, 130),
    ],
)  # fmt: skip
def test_the_exit_code_is_that_of_the_build(cluster, status, code, gives):
    cluster.add("job", status, code)
    cluster.log = "captions: 12 in 4 shards\n"
    written = []
    found, details = submit.follow(cluster, "job", written.append)
    assert (found, details.status) == (gives, status)
    assert "".join(written) == cluster.log


def test_a_log_is_shown_once_however_often_the_connection_breaks(cluster, monkeypatch):
    monkeypatch.setattr(submit, "RECONNECT_SECONDS", 0)
    cluster.add("job", JobStatus.SUCCEEDED, 0)
    cluster.log = "".join(f"line {number}\n" for number in range(40))
    cluster.cuts = [3, 0, 100, 100, 41, 250]
    written = []
    assert submit.follow(cluster, "job", written.append)[0] == 0
    assert "".join(written) == cluster.log


def test_a_cluster_that_is_gone_is_said(cluster, monkeypatch):
    monkeypatch.setattr(submit, "RECONNECT_SECONDS", 0)
    cluster.add("job", JobStatus.RUNNING)
    cluster.cuts = [0] * 100
    with pytest.raises(ConnectionError, match="job job may still be running: --attach"):
        submit.follow(cluster, "job", print)


# -- the verb ----------------------------------------------------------------------------------


@pytest.fixture
def ovref(cluster, monkeypatch, tmp_path, capsys):
    """The command with the fake cluster: (exit code, stdout, stderr)."""
    monkeypatch.setattr(submit, "connect", lambda address: cluster)
    path = tmp_path / "build.yaml"
    path.write_text(yaml.safe_dump(dump(CONFIG)))

    def run(*arguments):
        code = cli.main(["submit", "--config", str(path), *arguments])
        return code, *capsys.readouterr()

    return run


def test_submit_detach_attach(cluster, ovref):
    code, printed, error = ovref("--detach")
    name = submit.job_name(CONFIG)
    assert (code, printed) == (0, "") and f"submitted as job {name}" in error
    code, _, error = ovref("--detach")
    assert code == 2 and "pending already" in error
    cluster.log = "images: 3/9 shards\n"
    cluster.jobs[0].status, cluster.jobs[0].driver_exit_code = JobStatus.FAILED, 1
    code, printed, error = ovref("--attach")
    assert (code, printed) == (1, cluster.log)
    assert error == f"ovref: job {name} failed: the message\n"
    assert cli.main(["submit", "--attach", name]) == 1
    assert cli.main(["submit", "--attach", "ovref-another"]) == 2


def test_leaving_the_log_leaves_the_job(cluster, ovref, monkeypatch):
    def leave(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, "follow", leave)
    code, _, error = ovref()
    assert code == 130 and f"keeps running; --attach {submit.job_name(CONFIG)} follows" in error
    assert len(cluster.jobs) == 1


# -- over HTTP ---------------------------------------------------------------------------------

TOOL = """#!/bin/sh
# Stands for the command on the cluster: answers as the output's name says.
cat "$3" > "$0.sent"
echo "the build begins"
case $(grep ^output: "$0.sent") in
  *fine*) echo "the build ends"; exit 0;;
  *mend*) echo "to be mended"; exit 2;;
  *long*) trap 'echo drained; exit 130' TERM; while true; do sleep 0.2; done;;
esac
"""


def make_tool(folder):
    (folder / "ovref").write_text(TOOL)
    (folder / "ovref").chmod(0o755)


def test_ray_s_client_over_http(tmp_path, monkeypatch, capsys):
    make_tool(tmp_path)
    settings = ["engine.engine=ray", "corpus.path=/c", f"output={tmp_path}/fine"]
    build = ["--config", str(ROOT / "configs" / "miniature.yaml"), *settings]
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")  # --address wins
    with JobServer(tmp_path, ray.__version__) as server:

        def ovref(*arguments):
            code = cli.main(["submit", "--address", server.address, *build, *arguments])
            return code, *capsys.readouterr()

        code, printed, error = ovref()
        assert (code, printed) == (0, "the build begins\nthe build ends\n")
        assert re.fullmatch(
            r"ovref: submitted as job (ovref-fine-\w{12})\novref: job \1 succeeded\n", error
        )
        config = load(BuildConfig, tmp_path / "ovref.sent")
        assert config == load(BuildConfig, build[1], settings)
        code, _, error = ovref()
        assert code == 2 and "has succeeded already" in error
        code, printed, error = ovref("--again", "--detach")
        assert (code, printed) == (0, "") and "-2\n" in error
        code, printed, _ = ovref("--attach")
        assert (code, printed) == (0, "the build begins\nthe build ends\n")

        build[-1] = f"output={tmp_path}/mend"
        code, printed, error = ovref()
        assert (code, printed) == (2, "the build begins\nto be mended\n")
        assert error.endswith("failed: exit code 2\n")
        code, _, error = ovref()
        assert code == 2 and "submitted as job ovref-mend-" in error and "-2\n" in error


# -- a real head -------------------------------------------------------------------------------

HEAD = """
import sys, ray
for attempt in range(3):  # Ray waits half a minute for its processes: a busy machine may be later
    try:
        context = ray.init("local", num_cpus=2, include_dashboard=True, log_to_driver=False,
                           object_store_memory=80 << 20)
        break
    except Exception as error:
        ray.shutdown()
        print(error, file=sys.stderr)
print("http://" + context.dashboard_url, flush=True)
sys.stdin.read()
ray.shutdown()
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """Address of a head with a dashboard; a fake `ovref` is the first on its path."""
    folder = tmp_path_factory.mktemp("head")
    make_tool(folder)
    environment = {
        **os.environ, "RAY_AUTH_MODE": "disabled",
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        environment.pop(name, None)
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-c", HEAD], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        ) as process,  # whose input is closed in the end: then it leaves
    ):  # fmt: skip
        address = process.stdout.readline().strip()
        assert address.startswith("http://"), (folder / "log").read_text()
        yield address


@pytest.mark.slow
# Ray's client calls aiohttp so.
@pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")
def test_on_a_real_head(head, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")  # --address wins
    client = submit.connect(head)

    def at(name):
        return changed(output=f"/tmp/{tmp_path.name}/{name}")

    written = []
    fine = submit.submit(client, at("fine"))
    assert submit.follow(client, fine, written.append)[0] == 0
    assert "the build begins\nthe build ends\n" in "".join(written)
    with pytest.raises(ConfigError, match="succeeded already"):
        submit.submit(client, at("fine"))

    mend = submit.submit(client, at("mend"))
    assert submit.follow(client, mend, written.append)[0] == 2
    assert submit.submit(client, at("mend")) == f"{mend}-2"

    long = submit.submit(client, at("long"))
    with pytest.raises(ConfigError, match=f"already, as job {long}"):
        submit.submit(client, at("long"))
    assert submit.latest(client, at("long")) == long
    while "the build begins" not in client.get_job_logs(long):
        time.sleep(0.2)
    assert client.stop_job(long)
    written.clear()
    assert submit.follow(client, long, written.append)[0] == 130
    assert "drained" in "".join(written)
    assert submit.submit(client, at("long")) == f"{long}-2"
    assert client.stop_job(f"{long}-2")
