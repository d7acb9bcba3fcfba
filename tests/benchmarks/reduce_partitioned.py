"""A reduction in partitions against an undivided one, of the same reference shards.

    python tests/benchmarks/reduce_partitioned.py --references 100000 --nouns 5000 \\
        --partition 25000 --scratch SCRATCH

Each reduction begins with shards of references in a local folder and ends with a published
collection. The references are those of `reduce_million.py`, in shards of `--shard` references; the
text encoder gives each noun the embedding that was drawn for it. Every task of the partitioned
reduction runs in a process of its own, one at a time, so that its CPU seconds (without importing
libraries, by all threads, of which there is one) and its largest resident memory are its own; so
does the undivided reduction as a whole. Disk is the largest size of the work folder and of what is
scattered, sampled. Writes results/reduce_partitioned_<references>x<width>.json. SCRATCH needs six
times the embeddings; a part that was measured before is not run again.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from machine import commit, processor

os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}

import numpy as np

HERE = Path(__file__).parent


class Texts:
    """Gives each noun the embedding that was drawn for it; read when it is first needed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def encode(self, texts: list[str]) -> np.ndarray:
        rows = [int(text.rpartition(" ")[2]) for text in texts]
        return np.load(self._path, mmap_mode="r")[rows]


def embed_spec() -> Any:
    from ovref.stages.embed import Embed
    from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig

    return Embed(
        visual=VisualEncoderConfig(model="drawn"), text=TextEncoderConfig(model="drawn"),
        templates=("{}",),
    )  # fmt: skip


def make_shards(scratch: Path, references: int, nouns: int, width: int, rows: int) -> None:
    """The references of `reduce_million.make` as a finished step."""
    import pyarrow as pa

    from ovref.identity import spec_identity
    from ovref.storage.codec import COLUMNS, NOUN
    from ovref.storage.file_store import Store
    from ovref.storage.shards import TableFile
    from ovref.storage.steps import open_step
    from ovref_inference.collection import format as fmt
    from reduce_million import make

    folder = scratch / "drawn"
    folder.mkdir(parents=True)
    make(folder, references, nouns, width)
    vectors = {name: fmt.open_vectors(folder / fmt.FILES[name]) for name in ("visual", "textual")}
    kinds = COLUMNS["reference"] | {name: pa.list_(pa.float16(), width) for name in vectors}
    schema = pa.schema(list(kinds.items()))
    identity = {"stages": [spec_identity(embed_spec())]}
    step = open_step(Store.open(str(scratch)), "references", identity)
    table = fmt.open_table(folder / fmt.FILES["references"], fmt.REFERENCE_SCHEMA).read()
    names = []
    for start in range(0, references, rows):
        part = table.slice(start, rows).combine_chunks()
        n = len(part)
        zeros = pa.array(np.zeros(n, np.int32))
        text = part.column("noun").combine_chunks()
        columns = {
            "noun": pa.StructArray.from_arrays([text, zeros, zeros], fields=list(NOUN)),
            "box_xyxy": pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(4 * n, np.int32)), 4),
        }
        for name in ("key", "caption", "source", "seed"):
            columns[name] = part.column(name).combine_chunks()
        for name in ("area", "score"):
            columns[name] = part.column(name).cast(pa.float64()).combine_chunks()
        for name, matrix in vectors.items():
            flat = pa.array(np.ascontiguousarray(matrix[start : start + n]).ravel())
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, width)
        names.append(f"{len(names):06d}")
        with TableFile(schema) as file:
            whole = pa.table(columns).select(schema.names)
            for at in range(0, n, 1024):
                file.write(whole.slice(at, 1024))
            step.publish(names[-1], file, inputs=n)
    step.finish(names)
    shutil.move(folder / "texts.npy", scratch / "texts.npy")
    shutil.rmtree(folder)


def in_own_processes(tasks: Sequence[Callable[[], Any]]) -> Iterator[Any]:
    """Runs each task in a process of its own, one after another, and notes what it took."""
    for task in tasks:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            result, cpu_s, peak = pool.submit(_measured, task).result()
        TASKS.append({"task": task.func.__name__, "cpu_s": cpu_s, "max_rss_gb": peak})
        yield result


TASKS: list[dict[str, Any]] = []


def reduce(scratch: Path, name: str, partition: int | None) -> dict[str, Any]:
    """One reduction, and what it took in this process and, in partitions, in those of its tasks."""
    from ovref.reduce import ReduceSpec, reduce_collection
    from ovref.reduce.phases import in_process
    from ovref.storage.file_store import Store
    from ovref.storage.steps import existing_step

    phases: dict[str, float] = {}
    watch = threading.Event()
    peak = {"work": 0, "scattered": 0}
    folders = {"work": scratch / f"{name}_work", "scattered": scratch / name / "_scatter"}

    def sample() -> None:
        while not watch.wait(0.5):
            for kind, folder in folders.items():
                peak[kind] = max(peak[kind], _size(folder))

    thread = threading.Thread(target=sample)
    thread.start()
    began, began_cpu = time.monotonic(), time.process_time()
    try:
        summary = reduce_collection(
            existing_step(Store.open(str(scratch)), "references"),
            ReduceSpec(partition_references=partition),
            embed=embed_spec(),
            texts=Texts(scratch / "texts.npy"),
            output=Store.open(str(scratch / name)),
            work=folders["work"],
            run_tasks=in_process if partition is None else in_own_processes,
            report=lambda phase, done, total: phases.update({phase: time.monotonic() - began}),
        )
    finally:
        watch.set()
        thread.join()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found = {
        "wall_s": time.monotonic() - began,
        "own_cpu_s": time.process_time() - began_cpu,
        "own_max_rss_gb": usage.ru_maxrss * 1024 / 1e9,
        "disk_gb": {kind: size / 1e9 for kind, size in peak.items()},
        "collection_gb": _size(scratch / name) / 1e9,
        "until_s": phases,
        **{key: summary[key] for key in ("references", "nouns", "rare_nouns", "prototypes")},
    }
    if partition is not None:
        found |= {key: summary[key] for key in ("partitions", "largest_partition")}
        found["sizes"] = [
            part["references"]
            for part in json.loads((scratch / name / "collection.json").read_text())["partitions"]
        ]
        kinds = dict.fromkeys(task["task"] for task in TASKS)
        found["tasks"] = {
            kind: {
                "tasks": len(some := [task for task in TASKS if task["task"] == kind]),
                "cpu_s": sum(task["cpu_s"] for task in some),
                "max_rss_gb": max(task["max_rss_gb"] for task in some),
            }
            for kind in kinds
        }
    found["cpu_s"] = found["own_cpu_s"] + sum(task["cpu_s"] for task in TASKS)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--references", type=int, default=100_000)
    parser.add_argument("--nouns", type=int, default=5_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--partition", type=int, default=25_000)
    parser.add_argument("--shard", type=int, default=1024, help="references of a shard")
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir(), "ovref_reduce_partitioned")
    )
    parser.add_argument("--only", choices=("undivided", "partitioned"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    scratch = arguments.scratch
    if arguments.only:
        partition = arguments.partition if arguments.only == "partitioned" else None
        found = reduce(scratch, arguments.only, partition)
        (scratch / f"{arguments.only}.json").write_text(json.dumps(found))
        return
    if not (scratch / "references" / "complete.json").exists():
        shutil.rmtree(scratch, ignore_errors=True)
        make_shards(
            scratch, arguments.references, arguments.nouns, arguments.width, arguments.shard
        )
    sides = {}
    for side in ("undivided", "partitioned"):
        path = scratch / f"{side}.json"
        if not path.exists():
            for left in (scratch / side, scratch / f"{side}_work"):
                shutil.rmtree(left, ignore_errors=True)
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", side], check=True)
            shutil.rmtree(scratch / side)
        sides[side] = json.loads(path.read_text())
    n = sides["undivided"]["references"]
    report = {
        "references": n, "nouns": arguments.nouns, "width": arguments.width,
        "partition_references": arguments.partition, "shard": arguments.shard,
        "machine": f"{processor()}, {os.cpu_count()} cores", "python": platform.python_version(),
        "commit": commit(), **sides,
        "cpu_ms_per_reference": {side: 1e3 * sides[side]["cpu_s"] / n for side in sides},
        "cpu_ratio": sides["partitioned"]["cpu_s"] / sides["undivided"]["cpu_s"],
    }  # fmt: skip
    out = HERE / "results" / f"reduce_partitioned_{n}x{arguments.width}.json"
    out.write_text(json.dumps(_rounded(report), indent=1) + "\n")
    print(out.read_text())


def _measured(task: Callable[[], Any]) -> tuple[Any, float, float]:
    import ovref.reduce.collection  # noqa: F401 - its time is not the task's
    from ovref_inference.collection.index import faiss_module

    faiss_module()
    began = time.process_time()
    result = task()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return result, time.process_time() - began, usage.ru_maxrss * 1024 / 1e9


def _size(folder: Path) -> int:
    """Bytes of the files below a folder, of a file with several names once."""
    sizes = {}
    for path in folder.rglob("*"):
        try:
            found = path.stat()
        except OSError:
            continue  # removed meanwhile
        if path.is_file():
            sizes[found.st_ino] = found.st_size
    return sum(sizes.values())


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
