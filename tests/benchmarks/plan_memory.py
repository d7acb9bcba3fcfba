"""CPU seconds and largest resident memory of the plan of a reduction in partitions.

    python tests/benchmarks/plan_memory.py --nouns 436000 --references 100000000 --scratch SCRATCH

Nouns are drawn: embeddings around 1,000 centres, counts by Zipf's law. Committed counts and
embeddings are written first; adding up the counts and the plan each run in a process of their own,
as `ovref.reduce.partitioned` runs them. Embeddings are stored as drawn, without compression, so
that reading them takes less CPU than it would otherwise. SCRATCH needs 6 kB a noun, the temporary
folder 6 kB a noun. Prints JSON, with the plan's SHA-256.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}

import numpy as np
import pyarrow as pa

from ovref.reduce.partition_tree import read_tree
from ovref.reduce.scatter import (
    COUNTED,
    NOUNS_A_TASK,
    PLAN,
    PLANNED,
    _lists,
    make_plan,
    total_counts,
    vocabulary,
)
from ovref.storage.file_store import Store
from ovref.storage.shards import TableFile
from ovref.storage.steps import StepFolder, open_step

CENTRES, GROUPS = 1_000, 8


def draw(steps: list[StepFolder], nouns: int, references: int, width: int) -> None:
    """Commits the counts of a few groups, and the embeddings of all nouns."""
    counts, encoded = steps
    rng = np.random.default_rng(0)
    of_noun = 1 / (1 + rng.permutation(nouns))
    of_noun = np.maximum(GROUPS, references * of_noun / of_noun.sum()).astype(np.int64) // GROUPS
    names = pa.array([f"noun {number:07d}" for number in range(nouns)])
    for number in range(GROUPS):
        _commit(counts, f"{number:06d}", pa.table([names, of_noun], schema=COUNTED))
    centres = rng.standard_normal((CENTRES, width), dtype=np.float32)
    schema = pa.schema([PLANNED.field(name) for name in ("noun", "embedding")])
    for start in range(0, nouns, NOUNS_A_TASK):
        some = names.slice(start, NOUNS_A_TASK)
        vectors = rng.standard_normal((len(some), width), dtype=np.float32)
        vectors += centres[rng.integers(CENTRES, size=len(some))]
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        _commit(encoded, f"{start:09d}", pa.table([some, _lists(vectors)], schema=schema))


def add_up(counts: StepFolder) -> pa.Table:
    """What the driver hands to the plan."""
    return vocabulary(total_counts(counts), None)


def _commit(step: StepFolder, name: str, table: pa.Table) -> None:
    with TableFile(table.schema, compression="none", use_dictionary=False) as file:
        file.write(table)
        step.publish(name, file, inputs=len(table))


def _measured(call: Callable[..., Any], *given: Any) -> tuple[Any, dict[str, float]]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    began = time.process_time()
    result = call(*given)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    cpu_s = time.process_time() - began
    found = {"cpu_s": cpu_s, "max_rss_gb": peak, "max_rss_before_gb": before}
    return result, {name: round(value, 2) for name, value in found.items()}


def _alone(call: Callable[..., Any], *given: Any) -> tuple[Any, dict[str, float]]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measured, call, *given).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nouns", type=int, default=436_000)
    parser.add_argument("--references", type=int, default=100_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--partition", type=int, default=1_000_000)
    parser.add_argument("--scratch", type=Path, required=True)
    arguments = parser.parse_args()
    store = Store.open(str(arguments.scratch))
    counts, encoded, plan = (open_step(store, name, {}) for name in ("counts", "nouns", "plan"))
    if not encoded.complete():
        draw([counts, encoded], arguments.nouns, arguments.references, arguments.width)
        encoded.finish(encoded.committed())
    plan.take_back(plan.committed())
    nouns, driver = _alone(add_up, counts)
    _, task = _alone(make_plan, plan, nouns, encoded, arguments.partition, None)
    files = plan.required(PLAN).files
    with plan.file(PLAN, "npz") as path:
        leaves = read_tree(path, store.url).leaves
    found = {
        "nouns": arguments.nouns, "partitions": leaves, "driver": driver, "plan": task,
        "sha256": {kind: file.sha256 for kind, file in files.items()},
    }  # fmt: skip
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
