"""Builds on a Ray of several nodes, of which drivers, workers and nodes are killed at random.

    python tests/benchmarks/kills_ray.py [--kills 100] [--seed 0] [--minutes 30] [--output FILE]

The cluster is of this machine: a head that takes no work and two nodes with room for one worker
each. A build is a process of its own that joins it. After a random time up to `LONGEST_S` one of
these gets SIGKILL: the driver (which is then started again); a random worker that is loading or at
work, of a step or of the reduction; or a node, raylet and all (another then takes its place). So
it continues up to `PER_BUILD` times, then the build may finish. It counts as good if every file of
every step and of the collection is byte for byte that of an undisturbed build in one process, and
every input of every step has exactly one answer. Stages are cheap fakes.

A build that gives up by itself (too many deaths of one shard) is started again, as its message
says, and counted; so are records that were taken for the reason of the deaths and left out, which
`ovref retry-failed` then makes again. `--output` adds the run to a list of runs.
"""

import argparse
import contextlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before the fakes are imported, and for the workers: shards of 0.2 s; nothing in the home folder.
os.environ["OVREF_FAKE_MOMENT"] = "0.05"
os.environ["RAY_AUTH_MODE"] = "disabled"
import psutil
from recipe_fakes import FakeTexts, answered_once, content_of, fake_build, finish, processes, where

from kills import PER_BUILD, record
from ovref.errors import OvrefError
from ovref_pipelines import recipe
from ovref_pipelines.engine.config import EngineConfig
from ovref_pipelines.recipe import BuildConfig
from ovref_pipelines.verbs import retry

CAPTIONS, SHARD_SIZE = 48, 4
LONGEST_S = 12.0
VICTIMS = {"driver": 3, "worker": 5, "node": 2}
"""How often each is chosen, of ten."""
GAVE_UP = 5
"""Exit code of a build that ended without a collection."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30.0, help="gives up after so long")
    parser.add_argument("--output", help="JSON file of results")
    options = parser.parse_args()

    rng, started = random.Random(options.seed), time.monotonic()
    counts: Counter[str] = Counter()
    interrupted: Counter[str] = Counter()
    victims: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch, small_cluster() as cluster:
        folder = Path(scratch, "undisturbed")
        folder.mkdir()
        undisturbed = fake_build(folder, CAPTIONS, SHARD_SIZE)
        finish(undisturbed)
        wanted = content_of(undisturbed)
        while victims.total() < options.kills:
            if time.monotonic() - started > 60 * options.minutes:
                break
            folder = Path(scratch, f"build{counts['builds']}")
            folder.mkdir()
            engine = EngineConfig(address=cluster.address, workers=2, progress_seconds=1000.0)
            config = replace(fake_build(folder, CAPTIONS, SHARD_SIZE), engine=engine)
            left = min(PER_BUILD, options.kills - victims.total())
            run_one(config, cluster, rng, left, counts, victims, interrupted)
            counts["builds"] += 1
            made = content_of(config)
            counts["identical"] += made == wanted
            counts["answered_once"] += answered_once(config)
            if made != wanted:
                names = {name for name in made | wanted if made.get(name) != wanted.get(name)}
                print(f"build {counts['builds']} differs in {sorted(names)}", flush=True)
            print(json.dumps(counts), json.dumps(victims), flush=True)
    result = {
        "kills": victims.total(),
        "builds": counts["builds"],
        "identical": counts["identical"],
        "answered_once": counts["answered_once"],
        "interrupted": interrupted,
        "victims": victims,
        "nodes_gone_by_themselves": counts["nodes_gone"],
        "gave_up_and_started_again": counts["gave_up"],
        "records_made_again_by_retry_failed": counts["retried"],
        "stages": "fakes",
        "engine": "ray, two nodes with one worker each",
        "files": len(wanted),
        "seed": options.seed,
        "per_build": PER_BUILD,
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    record(result, options.output)
    good = counts["builds"] == counts["identical"] == counts["answered_once"]
    return 0 if good and victims.total() >= options.kills else 1


def run_one(
    config: BuildConfig,
    cluster: Any,
    rng: random.Random,
    kills: int,
    counts: Counter[str],
    victims: Counter[str],
    interrupted: Counter[str],
) -> None:
    """Builds, and kills up to so many times; returns when the collection is published."""
    child = started(config)
    while True:
        child.join(rng.uniform(0, LONGEST_S))
        counts["nodes_gone"] += replace_gone_nodes(cluster)
        if child.exitcode is None:
            if kills == 0:
                continue
            if (victim := kill_one(child, cluster, rng)) is not None:
                interrupted[where(config)] += 1
                victims[victim] += 1
                kills -= 1
            if victim != "driver":
                continue
        elif child.exitcode == GAVE_UP:
            counts["gave_up"] += 1
            print(Path(config.work).with_name("error.txt").read_text(), flush=True)
        elif child.exitcode != 0:
            raise SystemExit(f"the driver ended with {child.exitcode}")
        elif not (retried := take_back(config)):
            return
        else:
            counts["retried"] += retried
        child = started(config)


def started(config: BuildConfig) -> Any:
    child = processes().Process(target=run_build, args=[config])
    child.start()
    return child


def run_build(config: BuildConfig) -> None:
    """What a driver does."""
    sys.stderr = io.StringIO()
    recipe._LazyTexts = FakeTexts
    error_txt = Path(config.work).with_name("error.txt")
    try:
        summary = recipe.build(config)
    except OvrefError as error:
        error_txt.write_text(f"{type(error).__name__}: {error}\n")
        raise SystemExit(GAVE_UP) from error
    if summary.collection is None:
        error_txt.write_text(f"{summary.quarantined} shards failed permanently\n")
        raise SystemExit(GAVE_UP)


def take_back(config: BuildConfig) -> int:
    """What `ovref retry-failed replace=true` does; how many records it takes back."""
    config = replace(config, replace=True)
    folders = recipe.open_steps(config)
    return retry.take_back(config, folders, retry.failed_in(config, folders))


def kill_one(child: Any, cluster: Any, rng: random.Random) -> str | None:
    """Kills something; what it was, or None if there is nothing of that kind."""
    victim = rng.choices(list(VICTIMS), list(VICTIMS.values()))[0]
    if victim == "driver":
        child.kill()
        child.join()
        return victim if child.exitcode == -signal.SIGKILL else None
    if victim == "node":
        nodes = sorted(cluster.worker_nodes, key=lambda node: node.node_id)
        cluster.remove_node(rng.choice(nodes), allow_graceful=False)
        add_node(cluster)
        return victim
    pids = sorted(workers_of(cluster))
    if not pids:
        return None
    with contextlib.suppress(ProcessLookupError):
        os.kill(rng.choice(pids), signal.SIGKILL)
        return victim
    return None


def replace_gone_nodes(cluster: Any) -> int:
    """Adds a node for each that ended by itself, as one does whose heartbeats come late because
    the machine is busy; how many there were."""
    gone = [node for node in cluster.worker_nodes if raylet_of(node).poll() is not None]
    for node in gone:
        cluster.remove_node(node, allow_graceful=False)
        add_node(cluster)
    return len(gone)


def raylet_of(node: Any) -> Any:
    (raylet,) = node.all_processes["raylet"]
    return raylet.process


def workers_of(cluster: Any) -> list[int]:
    """Processes of this cluster's nodes that load models or carry out an order or a task."""
    found = []
    for node in cluster.worker_nodes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(raylet_of(node).pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    title = process.cmdline()[0]
                    if title.startswith("ray::") and not title.startswith("ray::IDLE"):
                        found.append(process.pid)
    return found


@contextlib.contextmanager
def small_cluster() -> Any:
    """A head that takes no work and two nodes with room for one worker each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    cluster.add_node(num_cpus=0, include_dashboard=False, object_store_memory=80 << 20)
    for _ in range(2):
        add_node(cluster)
    try:
        yield cluster
    finally:
        cluster.shutdown()


def add_node(cluster: Any) -> None:
    cluster.add_node(num_cpus=1, object_store_memory=80 << 20)


if __name__ == "__main__":
    raise SystemExit(main())
