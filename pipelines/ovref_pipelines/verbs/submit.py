"""Submits a build to a Ray cluster as a job, follows it, and attaches to it later.

The effective configuration is part of the job's command, so the cluster needs none of the sender's
files. A job's name is derived from its output and settings, and Ray refuses duplicate names, so a
build cannot be started twice by accident.
"""

import asyncio
import dataclasses
import logging
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.runtime_env import RuntimeEnv

from ovref.config import dump
from ovref.corpora.spec import MINIATURE
from ovref.errors import ConfigError
from ovref.identity import fingerprint
from ovref.locations import is_relative
from ovref_pipelines.build_config import BuildConfig
from ovref_pipelines.shipped import PREFIX

NOT_IDENTITY = ("engine", "work", "replace", "accept_older", "allow_incomplete")
"""Settings that do not change the build, only how it is run."""
NOWHERE = (MINIATURE, PREFIX)
"""Prefixes of places that are the same on every machine with ovref."""
END = "END_OF_CONFIGURATION"

STOPPED = 130
RECONNECTS = 10
"""Number of consecutive failed requests to the cluster allowed while a job is followed."""
RECONNECT_SECONDS = 3.0
STOP_SECONDS = 10
"""Extra time for a stopped job, beyond its drain time."""
NO_AGENT = "No available agent to submit job"
"""Answer of a head whose job agent has not started yet."""
AGENT_SECONDS = 120.0
"""Time for which such requests are repeated; each one waits 10 s itself."""
AGENT_RETRY_SECONDS = 3.0


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the cluster whose dashboard is at `address` (`http://HEAD:8265`).

    Args:
        address: None takes $RAY_API_SERVER_ADDRESS, $RAY_ADDRESS or a Ray on this machine.

    Raises:
        ConfigError: there is no cluster, or it requires a token that was not given.
    """
    if address is not None:
        # Otherwise Ray's environment variables would override the given address.
        os.environ["RAY_API_SERVER_ADDRESS"] = address
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ConfigError(
            f"cannot reach a Ray cluster at {address or 'the address of the environment'}: "
            f"{error}; give --address http://HEAD:8265, and RAY_AUTH_MODE=token with "
            "RAY_AUTH_TOKEN where it wants a token"
        ) from error


def read_runtime_env(path: str | None) -> dict[str, Any]:
    """The runtime environment in a YAML file, checked by Ray; empty without a file.

    Raises:
        ConfigError: the file is missing or is not a runtime environment.
    """
    if path is None:
        return {}
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        RuntimeEnv(**(tree or {}))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no runtime environment: {error}") from error
    return tree or {}


def job_name(config: BuildConfig) -> str:
    """The name of a build as a job: `ovref-<end of its output>-<hash of output and settings>`."""
    settings = {key: value for key, value in dump(config).items() if key not in NOT_IDENTITY}
    words = re.sub("[^a-z0-9]+", "-", config.output.rstrip("/").rpartition("/")[2].lower())
    return f"ovref-{words.strip('-')[:24]}-{fingerprint(settings)[:12]}"


def entrypoint(config: BuildConfig) -> str:
    """The shell command of the job, with the whole configuration in it.

    Raises:
        ConfigError: the build would not run on the cluster, or would read or write files of one of
            its machines.
    """
    if config.engine.engine != "ray":
        raise ConfigError(
            f"engine.engine is {config.engine.engine}, which would build on the cluster's head "
            "alone; give engine.engine=ray engine.workers=..."
        )
    places = {
        "output": config.output,
        "corpus.path": config.corpus.path,
        "collection": config.collection,
        "base": config.base,
        "images_from": config.images_from,
        "work": config.work,
    }
    relative = [
        f"{name}={place}"
        for name, place in places.items()
        if place is not None and is_relative(place) and not place.startswith(NOWHERE)
    ]
    if relative:
        raise ConfigError(
            f"paths relative to this folder mean nothing on the cluster: {', '.join(relative)}; "
            "give URLs such as s3://bucket/name, or paths that all of its machines have mounted"
        )
    # The job joins the cluster that runs it, whatever address this machine knows it by.
    here = dataclasses.replace(config, engine=dataclasses.replace(config.engine, address=None))
    text = yaml.safe_dump(dump(here), sort_keys=False)
    return f"ovref build --config /dev/stdin <<'{END}'\n{text}{END}\n"


def submit(
    client: JobSubmissionClient,
    config: BuildConfig,
    runtime_env: dict[str, Any] | None = None,
    *,
    again: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> str:
    """Submits a build and returns the id of its job.

    If an earlier job of the same build has failed or was stopped, the new one gets its name with a
    number, and resumes where it ended. Waits for a head that has just started.

    Args:
        again: submit even if the build has succeeded before.
        say: called with a line for people when there is something to wait for.

    Raises:
        ConfigError: the build is waiting, running or has succeeded; or it cannot run there; or the
            cluster refuses it.
    """
    command, name, job = entrypoint(config), job_name(config), job_name(config)
    if earlier := attempts(client, config):
        number, last = earlier[-1]
        if not last.status.is_terminal():
            raise ConfigError(
                f"this build is {last.status.value.lower()} already, as job {last.submission_id}: "
                f"follow it with --attach, or stop it with `ovref cancel {last.submission_id}`"
            )
        if last.status == JobStatus.SUCCEEDED and not again:
            raise ConfigError(
                f"this build has succeeded already, as job {last.submission_id}; --again runs it "
                "once more, which makes what is missing in its output"
            )
        job = f"{name}-{number + 1}"
    environment = dict(runtime_env or {})
    # Ray kills a stopped job after 3 seconds by default; shards in flight should be finished.
    patience = str(math.ceil(config.engine.drain_seconds) + STOP_SECONDS)
    given = environment.get("env_vars") or {}
    environment["env_vars"] = {"RAY_JOB_STOP_WAIT_TIME_S": patience, **given}
    try:
        return _submit(
            client,
            say,
            entrypoint=command,
            submission_id=job,
            runtime_env=environment,
            metadata={"output": config.output},
        )
    except (RuntimeError, ValueError, RayError) as error:
        if any(found.submission_id == job for _, found in attempts(client, config)):
            raise ConfigError(
                f"this build has just been submitted by someone else, as job {job}: follow it with "
                "--attach"
            ) from error
        raise ConfigError(f"the cluster refuses the job: {error}") from error


def _submit(client: JobSubmissionClient, say: Callable[[str], None], **job: Any) -> str:
    """Ray's call, repeated while the head cannot start jobs yet."""
    deadline, said = time.monotonic() + AGENT_SECONDS, False
    while True:
        try:
            return client.submit_job(**job)
        except RuntimeError as error:
            if NO_AGENT not in str(error) or time.monotonic() >= deadline:
                raise
        if not said:
            say(
                "ovref: the cluster's head has no agent yet that could start the job; retrying "
                f"for {AGENT_SECONDS:g} s"
            )
            said = True
        time.sleep(AGENT_RETRY_SECONDS)


def every_job(client: JobSubmissionClient) -> list[JobDetails]:
    """All jobs of a cluster. Raises ConfigError if it does not answer."""
    try:
        return client.list_jobs()
    except (RuntimeError, RayError) as error:
        raise ConfigError(f"the cluster does not list its jobs: {error}") from error


def attempts(client: JobSubmissionClient, config: BuildConfig) -> list[tuple[int, JobDetails]]:
    """The jobs of this build on the cluster, first to last, with their numbers from 1.

    Raises:
        ConfigError: the cluster does not answer.
    """
    pattern = re.compile(re.escape(job_name(config)) + r"(?:-([0-9]+))?")
    found = []
    for details in every_job(client):
        if match := pattern.fullmatch(details.submission_id or ""):
            found.append((int(match[1] or 1), details))
    return sorted(found, key=lambda item: item[0])


def latest(client: JobSubmissionClient, config: BuildConfig) -> str:
    """The id of this build's last job. Raises ConfigError if there is none."""
    found = attempts(client, config)
    if not found:
        raise ConfigError(
            f"the cluster knows no job of this build ({job_name(config)}): was it submitted with "
            "the same output and settings?"
        )
    return str(found[-1][1].submission_id)


def check_known(client: JobSubmissionClient, job: str) -> None:
    """Raises ConfigError if the cluster has no job of this name."""
    try:
        client.get_job_info(job)
    except (RuntimeError, RayError) as error:
        raise ConfigError(f"the cluster knows no job {job}: {error}") from error


def follow(
    client: JobSubmissionClient, job: str, write: Callable[[str], None]
) -> tuple[int, JobDetails]:
    """Passes the job's log to `write` until the job ends.

    Returns:
        The exit code that `ovref build` would have had (130 if the job was stopped), and the final
        status in Ray.

    Raises:
        ConnectionError: the cluster has stopped answering; the job may still be running.
    """
    details = asyncio.run(_follow(client, job, write))
    if details.status == JobStatus.SUCCEEDED:
        return 0, details
    if details.status == JobStatus.STOPPED:
        return STOPPED, details
    code = details.driver_exit_code
    return (code if code is not None and 0 < code < 256 else 1), details


async def _follow(
    client: JobSubmissionClient, job: str, write: Callable[[str], None]
) -> JobDetails:
    seen = failures = 0
    while True:
        skip = seen  # every connection begins with the first line of the log
        try:
            async for text in client.tail_job_logs(job):
                failures = 0
                if new := text[skip:]:
                    write(new)
                    seen += len(new)
                skip = max(0, skip - len(text))
            details = client.get_job_info(job)
            if details.status.is_terminal():
                return details
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            failures += 1
            if failures > RECONNECTS:
                raise ConnectionError(
                    f"the cluster stopped answering ({error}); job {job} may still be running: "
                    "--attach follows it again"
                ) from error
        await asyncio.sleep(RECONNECT_SECONDS if failures else 0.5)
