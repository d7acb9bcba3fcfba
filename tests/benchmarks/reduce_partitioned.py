"""A reduction in partitions against an undivided one, of the same reference shards.

    python tests/benchmarks/reduce_partitioned.py --references 100000 --nouns 5000 \\
        --partition 25000 --scratch SCRATCH

Each reduction begins with shards of references in a local folder and ends with a published
collection. The references are those of `reduce_million.py`, in shards of `--shard` references; the
text encoder gives each noun the embedding that was drawn for it. Every partition is made in a
process of its own, one at a time, so that its CPU seconds (without importing libraries, by all
threads, of which there is one) and its largest resident memory are its own; tasks of another kind
share one process, and the undivided reduction has its own. Disk is the largest size of the work
folder and of what is scattered, sampled. What each task took is a line of
SCRATCH/partitioned.tasks.jsonl, so a run that was interrupted, or ended by --stop-after, resumes
where it stopped. SCRATCH needs six times the embeddings. With --spare-disk it needs three times,
for the partitioned side alone: shards and row groups are deleted as soon as nothing needs them.
Writes results/reduce_partitioned_<references>x<width>.json.
"""

import argparse
import ctypes
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
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from machine import commit, processor

os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}

import numpy as np

HERE = Path(__file__).parent
AGAIN = 75
"""Exit status of a run that is to be started again."""


class Texts:
    """Gives each noun the embedding that was drawn for it; read when it is first needed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def encode(self, texts: list[str]) -> np.ndarray:
        rows = [int(text.rpartition(" ")[2]) for text in texts]
        return self._embeddings[rows]

    @cached_property
    def _embeddings(self) -> np.ndarray:
        return np.load(self._path, mmap_mode="r")


def embed_spec() -> Any:
    from ovref.stages.embed import Embed
    from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig

    return Embed(
        visual=VisualEncoderConfig(model="drawn"), text=TextEncoderConfig(model="drawn"),
        templates=("{}",),
    )  # fmt: skip


def make_shards(
    scratch: Path, references: int, nouns: int, width: int, rows: int, until: float
) -> None:
    """The references of `reduce_million.make` as a finished step.

    Args:
        rows: of a shard; divides `reduce_million.BLOCK`.
        until: by time.monotonic(), when to stop; the next call goes on.
    """
    import pyarrow as pa

    from ovref.identity import spec_identity
    from ovref.storage.codec import COLUMNS, NOUN
    from ovref.storage.file_store import Store
    from ovref.storage.shards import TableFile, reference_options
    from ovref.storage.steps import open_step
    from reduce_million import BLOCK, columns_of, drawn

    scratch.mkdir(parents=True, exist_ok=True)
    kinds = COLUMNS["reference"] | {
        name: pa.list_(pa.float16(), width) for name in ("visual", "textual")
    }
    schema = pa.schema(list(kinds.items()))
    identity = {"stages": [spec_identity(embed_spec())]}
    step = open_step(Store.open(str(scratch)), "references", identity)
    at = len(step.committed()) * rows // BLOCK * BLOCK
    for of, *vectors in drawn(scratch, references, nouns, width, at):
        table = pa.table(_reference_columns(columns_of(of, at), vectors, NOUN))
        for start in range(0, len(of), rows):
            whole = table.slice(start, rows).select(schema.names).cast(schema)
            with TableFile(schema, **reference_options(schema)) as file:
                for part in range(0, len(whole), 1024):
                    file.write(whole.slice(part, 1024))
                step.publish(f"{(at + start) // rows:06d}", file, inputs=len(whole))
        at += len(of)
        if time.monotonic() > until:
            raise SystemExit(AGAIN)
    step.finish(step.committed())


def _reference_columns(columns: dict[str, Any], vectors: list[np.ndarray], noun: Any) -> Any:
    """Columns of `codec.COLUMNS`, with embeddings in float16."""
    import pyarrow as pa

    n = len(columns["noun"])
    zeros = pa.array(np.zeros(n, np.int32))
    box = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(4 * n, np.int32)), 4)
    text = pa.array(columns["noun"])
    found = {
        "noun": pa.StructArray.from_arrays([text, zeros, zeros], fields=list(noun)),
        "box_xyxy": box,
    }
    for name in ("key", "caption", "source", "seed", "area", "score"):
        found[name] = pa.array(columns[name])
    for name, matrix in zip(("visual", "textual"), vectors, strict=True):
        flat = pa.array(matrix.astype(np.float16).ravel())
        found[name] = pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])
    return found


class OwnProcesses:
    """Runs tasks in another process, one after another, and notes what each took."""

    def __init__(self, log: Path, spare: Callable[[Any], None] | None, until: float) -> None:
        self.log, self._spare, self._until = log, spare, until
        self.work_gb = 0.0
        self._driver_cpu_s = time.process_time()

    def __call__(self, tasks: Sequence[Callable[[], Any]]) -> Iterator[Any]:
        kind = tasks[0].func.__name__ if tasks else ""
        leaves = kind == "reduce_leaf"
        if leaves and self._spare is not None:
            self._spare(None)
        own = 1 if leaves else None  # the others share one process, whose memory bounds each
        spawn = get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=own) as pool:
            for task in tasks:
                began, self.work_gb = time.monotonic(), 0.0
                if began > self._until:
                    raise SystemExit(AGAIN)
                result, cpu_s, peak = pool.submit(_measured, task).result()
                names = (one for one in task.args if isinstance(one, str))
                self.note(
                    task=kind, name=next(names, "plan"), cpu_s=cpu_s, max_rss_gb=peak,
                    wall_s=time.monotonic() - began, work_gb=self.work_gb,
                )  # fmt: skip
                if leaves and self._spare is not None:
                    self._spare(task.args[0])
                yield result

    def note(self, **line: Any) -> None:
        """Appends a line, with the CPU seconds of this process since the line before."""
        now = time.process_time()
        line["driver_cpu_s"] = now - self._driver_cpu_s
        self._driver_cpu_s = now
        with self.log.open("a") as file:
            file.write(json.dumps(_rounded(line)) + "\n")

    def found(self) -> dict[str, Any]:
        """Sums over the tasks. One that was repeated after an interruption counts once."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        first = {(line["task"], line["name"]): line for line in reversed(lines)}
        kinds = dict.fromkeys(line["task"] for line in lines)
        tasks = {
            kind: {
                "tasks": len(some := [one for (task, _), one in first.items() if task == kind]),
                **{
                    name: sum(one[name] for one in some)
                    for name in ("cpu_s", "wall_s", "driver_cpu_s")
                },
                "each_cpu_s": [one["cpu_s"] for one in some],
                "longest_cpu_s": max(one["cpu_s"] for one in some),
                "max_rss_gb": max(one["max_rss_gb"] for one in some),
                "work_gb": max(one["work_gb"] for one in some),
            }
            for kind in kinds
        }
        driver = sum(line["driver_cpu_s"] for line in lines)
        return {
            "tasks": tasks, "own_cpu_s": driver,
            "cpu_s": driver + sum(kind["cpu_s"] for kind in tasks.values()),
        }  # fmt: skip


class Spare:
    """Frees the disk of shards once they are scattered, and of row groups once they are reduced."""

    def __init__(self, shards: Path) -> None:
        self._shards = shards

    def __call__(self, references: Any) -> None:
        """`references`: of the partition that is done; None before any is."""
        import pyarrow.parquet as pq

        from ovref.reduce.scatter import _LEAVES

        if references is None:
            for path in self._shards.glob("*.parquet"):
                path.unlink()
            return
        for group in references.groups:
            name = references.scattered.required(group).files["parquet"].name
            path = Path(references.scattered.store.url, name)
            metadata = pq.read_metadata(path)
            leaves = json.loads(metadata.metadata[_LEAVES])
            if references.leaf in leaves:
                part = metadata.row_group(leaves.index(references.leaf))
                first, last = part.column(0), part.column(part.num_columns - 1)
                start = first.dictionary_page_offset or first.data_page_offset
                end = last.dictionary_page_offset or last.data_page_offset
                _punch(path, start, end + last.total_compressed_size)


def _punch(path: Path, start: int, stop: int) -> None:
    """Gives the blocks between two offsets back to the file system (Linux)."""
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    with path.open("r+b") as file:
        keep_size_and_punch = 0x01 | 0x02
        if fallocate(file.fileno(), keep_size_and_punch, start, stop - start):
            raise OSError(ctypes.get_errno(), f"no hole in {path}")


def reduce(
    scratch: Path, name: str, partition: int | None, spare: bool, until: float
) -> dict[str, Any]:
    """One reduction, and what it took in this process and, in partitions, in those of its tasks."""
    from ovref.reduce import ReduceSpec, reduce_collection
    from ovref.reduce.phases import in_process
    from ovref.storage.file_store import Store
    from ovref.storage.steps import existing_step

    phases: dict[str, float] = {}
    watch = threading.Event()
    peak = {"work": 0, "scattered": 0}
    folders = {"work": scratch / f"{name}_work", "scattered": scratch / name / "_scatter"}
    # What a killed task had done would be missing in the figures of the one that goes on.
    shutil.rmtree(folders["work"], ignore_errors=True)
    run = OwnProcesses(
        scratch / "partitioned.tasks.jsonl", Spare(scratch / "references") if spare else None,
        until,
    )  # fmt: skip

    def sample() -> None:
        while not watch.wait(0.5):
            for kind, folder in folders.items():
                peak[kind] = max(peak[kind], _size(folder))
            run.work_gb = max(run.work_gb, _size(folders["work"]) / 1e9)

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
            run_tasks=in_process if partition is None else run,
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
        run.note(task="publish", name="", cpu_s=0.0, max_rss_gb=0.0, wall_s=0.0, work_gb=0.0)
        found |= run.found()
    else:
        found["cpu_s"] = found["own_cpu_s"]
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
    parser.add_argument("--only", choices=("undivided", "partitioned"))
    parser.add_argument("--keep", action="store_true", help="keep the collections in SCRATCH")
    parser.add_argument("--spare-disk", action="store_true", help="see above; Linux")
    parser.add_argument(
        "--stop-after", type=float, default=float("inf"), metavar="SECONDS",
        help=f"begin no further task after that, and exit with {AGAIN}",
    )  # fmt: skip
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=("undivided", "partitioned"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    scratch = arguments.scratch
    if arguments.child:
        partition = arguments.partition if arguments.child == "partitioned" else None
        found = reduce(scratch, arguments.child, partition, arguments.spare_disk, arguments.until)
        (scratch / f"{arguments.child}.json").write_text(json.dumps(found))
        return
    until = time.monotonic() + arguments.stop_after
    if not (scratch / "references" / "complete.json").exists():
        make_shards(
            scratch, arguments.references, arguments.nouns, arguments.width, arguments.shard,
            until,
        )  # fmt: skip
    for side in (arguments.only,) if arguments.only else ("undivided", "partitioned"):
        if not (scratch / f"{side}.json").exists():
            if side == "undivided":
                shutil.rmtree(scratch / side, ignore_errors=True)
            command = [sys.executable, __file__, *sys.argv[1:], "--child", side]
            code = subprocess.run([*command, "--until", str(until)]).returncode
            if code:
                raise SystemExit(code)
            if not arguments.keep:
                shutil.rmtree(scratch / side)
        _report(arguments)


def _report(arguments: argparse.Namespace) -> None:
    """Writes what was measured so far."""
    paths = {side: arguments.scratch / f"{side}.json" for side in ("undivided", "partitioned")}
    sides = {side: json.loads(path.read_text()) for side, path in paths.items() if path.exists()}
    n = next(iter(sides.values()))["references"]
    report = {
        "references": n, "nouns": arguments.nouns, "width": arguments.width,
        "partition_references": arguments.partition, "shard": arguments.shard,
        "machine": f"{processor()}, {os.cpu_count()} cores", "python": platform.python_version(),
        "commit": commit(), **sides,
        "cpu_ms_per_reference": {side: 1e3 * sides[side]["cpu_s"] / n for side in sides},
    }  # fmt: skip
    if len(sides) == 2:
        report["cpu_ratio"] = sides["partitioned"]["cpu_s"] / sides["undivided"]["cpu_s"]
    out = HERE / "results" / f"reduce_partitioned_{n}x{arguments.width}.json"
    out.write_text(json.dumps(_rounded(report), indent=1) + "\n")
    print(out.read_text())


def _measured(task: Callable[[], Any]) -> tuple[Any, float, float]:
    import ovref.reduce.collection  # noqa: F401 - its time is not the task's
    from ovref_inference.collection.exact import faiss_module

    faiss_module()
    began = time.process_time()
    result = task()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return result, time.process_time() - began, usage.ru_maxrss * 1024 / 1e9


def _size(folder: Path) -> int:
    """Disk that the files below a folder take, of a file with several names once."""
    sizes = {}
    for path in folder.rglob("*"):
        try:
            found = path.stat()
        except OSError:
            continue  # removed meanwhile
        if path.is_file():
            sizes[found.st_ino] = 512 * found.st_blocks  # fewer than its size if there are holes
    return sum(sizes.values())


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
