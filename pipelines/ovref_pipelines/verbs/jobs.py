"""Lists the builds that run as jobs on a Ray cluster, and stops them without losing committed
shards."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from ovref.errors import ConfigError, OvrefError
from ovref.storage.file_store import Store
from ovref_pipelines import live
from ovref_pipelines.engine.progress import duration
from ovref_pipelines.verbs.submit import every_job

PREFIX = "ovref-"
"""Prefix of the names of jobs made by `ovref submit`."""
POLL_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """A build as a job."""

    name: str
    status: str
    """`pending`, `running`, `succeeded`, `failed` or `stopped`."""
    output: str | None
    seconds: float | None
    """Time since its start, or its duration if it has ended."""
    message: str
    """Why it failed, or its progress if its output is readable from here."""


def jobs(client: JobSubmissionClient, *, every: bool = False) -> list[Job]:
    """The builds on the cluster, the newest first.

    Args:
        every: include jobs that have ended.

    Raises:
        ConfigError: the cluster does not list its jobs.
    """
    found = [d for d in _listed(client) if every or not d.status.is_terminal()]
    found.sort(key=lambda details: details.start_time or 0, reverse=True)
    return [_job(details) for details in found]


def jobs_text(found: list[Job], *, every: bool = False) -> str:
    """A line per job, for people."""
    if not found:
        kind = "job" if every else "running job"
        return f"the cluster knows no {kind} of ovref" + ("" if every else "; --all shows the rest")
    lines = []
    for job in found:
        took = "" if job.seconds is None else duration(job.seconds)
        parts = [job.name, job.status, took, job.output or "", job.message]
        lines.append("  ".join(part for part in parts if part))
    return "\n".join(lines)


def jobs_json(found: list[Job]) -> str:
    """A list of objects, for programs."""
    return json.dumps([asdict(job) for job in found], indent=1, ensure_ascii=False)


def cancel(
    client: JobSubmissionClient,
    named: str,
    *,
    wait: bool = True,
    say: Callable[[str], None] = lambda message: None,
) -> Job:
    """Stops a job: it finishes its shards in progress, as after SIGTERM, and is then `stopped`.

    Args:
        named: name of the job, or the output of a running build.
        wait: whether to wait until it has stopped.
        say: called with a line for people while waiting.

    Raises:
        ConfigError: no such job is running, several jobs write to that output, or the cluster
            refuses.
    """
    there = _listed(client)
    running = [details for details in there if not details.status.is_terminal()]
    matching = [d for d in running if named in (d.submission_id, _output(d))]
    if len(matching) != 1:
        over = [d for d in there if named in (d.submission_id, _output(d)) and d not in running]
        if over:
            raise ConfigError(f"job {named} has ended already: {over[-1].status.value.lower()}")
        names = ", ".join(str(details.submission_id) for details in matching or running) or "none"
        raise ConfigError(
            f"{'several jobs write' if matching else 'no running job of ovref has the name or'} "
            f"{'to' if matching else 'output'} {named}; found: {names}"
        )
    job = str(matching[0].submission_id)
    try:
        client.stop_job(job)
        details = client.get_job_info(job)
        if wait and not details.status.is_terminal():
            say(f"ovref: job {job} finishes its shards in progress")
        while wait and not details.status.is_terminal():
            time.sleep(POLL_SECONDS)
            details = client.get_job_info(job)
    except (RuntimeError, RayError) as error:
        raise ConfigError(f"the cluster does not stop job {job}: {error}") from error
    return _job(details)


def _listed(client: JobSubmissionClient) -> list[JobDetails]:
    return [job for job in every_job(client) if (job.submission_id or "").startswith(PREFIX)]


def _output(details: JobDetails) -> str | None:
    return (details.metadata or {}).get("output")


def _job(details: JobDetails) -> Job:
    seconds = None
    if details.start_time:
        end = details.end_time or time.time() * 1000
        seconds = max(0.0, (end - details.start_time) / 1000)
    message = ""
    if details.status == JobStatus.FAILED:
        message = (details.message or "").strip().rpartition("\n")[2]
    elif details.status == JobStatus.RUNNING:
        message = _how_far(_output(details))
    return Job(
        name=str(details.submission_id),
        status=details.status.value.lower(),
        output=_output(details),
        seconds=seconds,
        message=message,
    )


def _how_far(output: str | None) -> str:
    """The progress that the build reports in its output; empty if that is unreadable from here."""
    try:
        now: dict[str, Any] | None = None if output is None else live.read(Store.open(output))
    except (OvrefError, OSError):
        return ""
    return "" if now is None else live.text(now)
