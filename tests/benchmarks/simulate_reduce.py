"""A reduction in partitions by many workers, simulated from what single tasks took.

    python tests/benchmarks/simulate_reduce.py --measured reduce_partitioned_1000000x768.json
    python tests/benchmarks/simulate_reduce.py --validate

The steps follow each other as in `ovref.reduce.partitioned`: the tasks of a step are taken by
whoever is free, and the next step begins when all are done. A task takes the CPU seconds of one
that was measured, chosen by lot; the latency of its requests, of which a share fails and is
repeated as botocore does (after a random part of 1, 2, 4 ... s); and the time for its bytes. A
share of the attempts dies at a random moment, with what was done, and the task waits again. Tasks
grow with the references only in the number of requests. Writes results/simulate_reduce.json.

`--validate` makes a small collection on an S3 server (moto's) whose requests are held back, once
with one worker process and once with two, and compares the second with what is simulated from the
tasks of the first. Writes results/simulate_reduce_validated.json.
"""

import argparse
import heapq
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from machine import commit

os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}

import numpy as np

HERE = Path(__file__).parent
GROUP, NOUNS_A_TASK = 65_536, 4096
LISTED, MARKERS_AT_A_TIME = 1000, 128
"""Names of an answer to a listing; markers that the driver asks for at a time."""
DELAY_S = 0.03
OF_SHARD = {"count": 6, "scatter": 7}
"""Requests of these tasks for each shard, counted by --validate."""
OF_GROUP, OF_PARTITION = 5, 36
"""Requests of making a partition, for each group of shards and beside."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Tasks of one kind."""

    name: str
    tasks: int
    cpu_s: Sequence[float]
    """CPU seconds of tasks that were measured."""
    requests: float
    """Requests of a task, `parallel` at a time."""
    parallel: int
    gigabytes: float = 0.0
    """Read and written by a task."""


@dataclass(frozen=True, kw_only=True)
class World:
    workers: int
    delay_s: float
    failing: float
    """Share of the requests."""
    dying: float
    """Share of the attempts at a task."""
    gigabytes_s: float
    """Bandwidth of one worker."""

    def seconds(self, step: Step, rng: np.random.Generator) -> float:
        """Duration of an attempt that succeeds."""
        waited = failed = int(step.requests)
        total = waited * self.delay_s
        for attempt in range(8):
            failed = rng.binomial(failed, self.failing)
            total += failed * self.delay_s + rng.random(failed).sum() * 2**attempt
        return rng.choice(step.cpu_s) + total / step.parallel + step.gigabytes / self.gigabytes_s


def simulate(step: Step, world: World, rng: np.random.Generator) -> dict[str, Any]:
    """One step, from the moment when all workers are free until all its tasks are done."""
    free = [0.0] * world.workers
    waiting = [(0.0, number) for number in range(step.tasks)]
    busy = useful = longest = end = 0.0
    died = 0
    while waiting:
        ready, number = heapq.heappop(waiting)
        begin = max(ready, heapq.heappop(free))
        seconds = world.seconds(step, rng)
        if rng.random() < world.dying and "driver" not in step.name:
            seconds *= rng.random()
            died += 1
            heapq.heappush(waiting, (begin + seconds, number))
        else:
            useful += seconds
            longest = max(longest, seconds)
            end = max(end, begin + seconds)
        busy += seconds
        heapq.heappush(free, begin + seconds)
    return {
        "step": step.name, "tasks": step.tasks, "died": died, "makespan_s": end,
        "busy_s": busy, "useful_s": useful, "longest_s": longest,
        "utilisation": useful / max(end, 1e-9) / world.workers,
    }  # fmt: skip


def steps_of(
    measured: dict[str, Any], references: int, nouns: int, shard: int, noun_s: float
) -> list[Step]:
    """The steps of a reduction of as many references, from the tasks of a smaller one.

    Args:
        measured: of reduce_partitioned.py.
        shard: references of a shard.
        noun_s: CPU seconds to encode a noun.
    """
    side, width = measured["partitioned"], measured["width"]
    tasks = side["tasks"]
    each = {kind: found["each_cpu_s"] for kind, found in tasks.items()}
    groups, shards = -(-references // GROUP), -(-references // shard)
    partitions = round(references / np.mean(side["sizes"]))
    of_one = {kind: found["driver_cpu_s"] / measured["references"] for kind, found in tasks.items()}
    full = [cpu_s for cpu_s in each["scatter"] if cpu_s > 0.7 * max(each["scatter"])]
    counts = [cpu_s for cpu_s in each["count_nouns"] if cpu_s > 0.7 * max(each["count_nouns"])]
    group_gb = GROUP * 2 * width * 2 / 1e9
    plan_s = max(each["make_plan"]) * nouns / measured["nouns"]
    return [
        Step(name="markers (driver)", tasks=1, cpu_s=[of_one["count_nouns"] * references],
             requests=shards + shards / LISTED, parallel=MARKERS_AT_A_TIME),
        Step(name="count", tasks=groups, cpu_s=counts, requests=OF_SHARD["count"] * GROUP / shard,
             parallel=8),
        Step(name="counts (driver)", tasks=1, cpu_s=[of_one["encode_nouns"] * references],
             requests=3 * groups, parallel=8),
        Step(name="encode", tasks=-(-nouns // NOUNS_A_TASK), cpu_s=[noun_s * NOUNS_A_TASK],
             requests=3, parallel=1),
        Step(name="plan", tasks=1, cpu_s=[plan_s], requests=3 * nouns / NOUNS_A_TASK, parallel=8),
        Step(name="scatter", tasks=groups, cpu_s=full, parallel=8, gigabytes=2 * group_gb,
             requests=OF_SHARD["scatter"] * GROUP / shard),
        Step(name="partitions", tasks=partitions, cpu_s=each["reduce_leaf"], parallel=8,
             requests=OF_GROUP * groups + OF_PARTITION,
             gigabytes=2 * side["collection_gb"] / side["partitions"]),
        Step(name="publish (driver)", tasks=1, cpu_s=[of_one["publish"] * references],
             requests=2 * partitions, parallel=16),
    ]  # fmt: skip


def timed(task: Callable[[], Any]) -> tuple[Any, float, float, float]:
    """What a task returns, CPU seconds, and the wall clock at its begin and end."""
    began, began_cpu = time.time(), time.process_time()
    result = task()
    return result, time.process_time() - began_cpu, began, time.time()


def warm() -> None:
    """Loads libraries, whose time is no task's, and leaves time for the other workers to do so."""
    import ovref.reduce.collection  # noqa: F401
    from ovref_inference.collection.exact import faiss_module

    faiss_module()
    time.sleep(10)


def really(workers: int, url: str, proxy: Any, scratch: Path) -> list[dict[str, Any]]:
    """Makes a small collection and notes every task; requests if there is one worker."""
    from ovref.reduce import ReduceSpec, reduce_collection
    from ovref.storage.file_store import Store
    from ovref.storage.steps import existing_step
    from reduce_partitioned import Texts, embed_spec

    lines: list[dict[str, Any]] = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(timed, [warm] * workers))

        def run(tasks: Sequence[Callable[[], Any]]) -> Iterator[Any]:
            began = time.time()
            if workers == 1:
                found = []
                for task in tasks:
                    before = proxy.requests
                    found.append((*pool.submit(timed, task).result(), proxy.requests - before))
            else:
                found = [(*one, 0) for one in pool.map(timed, tasks)]
            for task, (_, cpu_s, start, stop, requests) in zip(tasks, found, strict=True):
                lines.append({
                    "task": task.func.__name__, "cpu_s": cpu_s, "begin_s": start - began,
                    "end_s": stop - began, "requests": requests,
                })  # fmt: skip
            yield from (one[0] for one in found)

        root = Store.open("s3://bucket/small", **proxy.options)
        reduce_collection(
            existing_step(root, "references"), ReduceSpec(partition_references=3000),
            embed=embed_spec(), texts=Texts(scratch / "texts.npy"),
            output=Store.open(f"{url}/made{workers}", **proxy.options),
            work=scratch / f"work{workers}", run_tasks=run,
        )  # fmt: skip
    return lines


def validate() -> dict[str, Any]:
    import s3fs

    from open_in_place import DelayingProxy
    from ovref.reduce import scatter
    from reduce_partitioned import make_shards

    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", "4572"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        time.sleep(5)
        proxy = DelayingProxy(4572, DELAY_S)
        proxy.options = {"endpoint_url": f"http://127.0.0.1:{proxy.port}"}
        s3fs.S3FileSystem(endpoint_url="http://127.0.0.1:4572").mkdir("bucket")
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            make_shards(scratch, 24_000, 1_000, 64, 512, float("inf"))
            fs = s3fs.S3FileSystem(endpoint_url="http://127.0.0.1:4572")
            fs.put(f"{scratch}/references/", "bucket/small/references/", recursive=True)
            scatter.GROUP_ROWS = 2048
            sides = {n: really(n, "s3://bucket", proxy, scratch) for n in (1, 2)}
    finally:
        server.terminate()
        server.wait()
    world = World(workers=2, delay_s=0, failing=0, dying=0, gigabytes_s=1)
    steps, rng = [], np.random.default_rng(0)
    for kind in dict.fromkeys(line["task"] for line in sides[1]):
        one, two = ([line for line in side if line["task"] == kind] for side in sides.values())
        seconds = iter([line["end_s"] - line["begin_s"] for line in one])
        world_of = World.seconds
        World.seconds = lambda *_, seconds=seconds: next(seconds)  # in their order
        predicted = simulate(
            Step(name=kind, tasks=len(one), cpu_s=[], requests=0, parallel=1), world, rng
        )
        World.seconds = world_of
        steps.append({
            "task": kind, "tasks": len(one), "requests": sum(line["requests"] for line in one),
            "cpu_s": sum(line["cpu_s"] for line in one),
            "one_worker_s": max(line["end_s"] for line in one),
            "two_workers_s": max(line["end_s"] for line in two),
            "simulated_s": predicted["makespan_s"],
        })  # fmt: skip
    totals = {name: sum(step[name] for step in steps) for name in (
        "one_worker_s", "two_workers_s", "simulated_s")}  # fmt: skip
    return {"steps": steps, **totals, "error": totals["simulated_s"] / totals["two_workers_s"] - 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measured", type=Path)
    parser.add_argument("--references", type=int, default=100_000_000)
    parser.add_argument("--nouns", type=int, default=436_000, help="by Heaps' law of estimate.py")
    parser.add_argument("--shard", type=int, default=1024, help="references of a shard")
    parser.add_argument("--noun-seconds", type=float, default=0.02, help="CPU s to encode a noun")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--faults", type=float, default=0.1)
    parser.add_argument("--validate", action="store_true")
    arguments = parser.parse_args()
    if arguments.validate:
        _write("simulate_reduce_validated", {"commit": commit(), **validate()})
        return
    measured = json.loads(arguments.measured.read_text())
    steps = steps_of(
        measured, arguments.references, arguments.nouns, arguments.shard, arguments.noun_seconds
    )
    report: dict[str, Any] = {
        "commit": commit(), "measured": arguments.measured.name,
        "references": arguments.references, "nouns": arguments.nouns, "shard": arguments.shard,
        "delay_s": DELAY_S, "faults": arguments.faults, "runs": [],
    }  # fmt: skip
    for faults in (0.0, arguments.faults):
        for workers in arguments.workers:
            world = World(workers=workers, delay_s=DELAY_S, failing=faults, dying=faults,
                          gigabytes_s=0.1)  # fmt: skip
            rng = np.random.default_rng(0)
            rows = [simulate(step, world, rng) for step in steps]
            total = sum(row["makespan_s"] for row in rows)
            useful = sum(row["useful_s"] for row in rows)
            report["runs"].append({
                "workers": workers, "faults": faults, "hours": total / 3600,
                "worker_hours": sum(row["busy_s"] for row in rows) / 3600,
                "utilisation": useful / total / workers, "steps": rows,
            })  # fmt: skip
    _write("simulate_reduce", report)


def _write(name: str, report: dict[str, Any]) -> None:
    from reduce_partitioned import _rounded

    path = HERE / "results" / f"{name}.json"
    path.write_text(json.dumps(_rounded(report), indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
