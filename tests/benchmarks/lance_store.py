"""A collection's visual embeddings in Lance and in a published collection: the same work.

    python -m venv LANCE && LANCE/bin/pip install pylance faiss-cpu pyarrow fsspec
    python tests/benchmarks/lance_store.py --scratch SCRATCH --lance LANCE/bin/python

Both store the same float16 visual embeddings of reduce_million.py on a folder, make an index, and
answer the same 200 queries that neither stores, one at a time, for 150 neighbours. ovref's side is
an inverted file of float16 codes as the reduction makes it (phases `index` and `tune`), and the
same in 8 bits. Lance's is IVF-PQ with rows / 4096 partitions and width / 16 sub-vectors, or four
times as many, whose candidates are ranked again by their whole vectors; `nprobes` and
`refine_factor` are the cheapest of a grid that reach recall 0.95, while ovref's `nprobe` is that of
its own curve. Then 1% of the rows are deleted and 5% appended, and Lance is asked again. CPU
seconds are of all threads; peak memory is of a process that does one side alone.
Writes results/lance_<references>.json.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

os.environ |= {
    name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LANCE_CPU_THREADS")
}

import numpy as np

HERE = Path(__file__).parent
K, TARGET, ASKED = 150, 0.95, 200


@contextmanager
def timed(found: dict[str, Any], name: str) -> Iterator[None]:
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    found[f"{name}_cpu_s"] = round(time.process_time() - cpu, 3)
    found[f"{name}_s"] = round(time.perf_counter() - wall, 3)


def peak_mb() -> float:
    # Not getrusage's, which includes what the parent held when it started this process.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(round(int(line.split()[1]) / 1024, 1) for line in lines if line[:5] == "VmHWM")


def size_mb(folder: Path) -> float:
    return round(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6, 1)


def truth(scratch: Path) -> tuple[np.ndarray, np.ndarray]:
    """Queries, and the score of each one's 150th neighbour."""
    queries = np.load(scratch / "filtered" / "visual_queries.npy")[:ASKED].astype(np.float32)
    return queries, np.load(scratch / "lowest.npy")


def recall(vectors: np.ndarray, queries: np.ndarray, ids: list, lowest: np.ndarray) -> float:
    """A returned row counts if it scores no worse than the true 150th, by its whole vector."""
    found = []
    for query, of_one, least in zip(queries, ids, lowest, strict=True):
        rows = np.sort(np.asarray(of_one)[:K])
        found.append((vectors[rows].astype(np.float32) @ query >= least - 1e-6).sum() / K)
    return float(np.mean(found))


def lance_side(scratch: Path, subvectors: int) -> dict[str, Any]:
    import lance
    import pyarrow as pa

    vectors = np.load(scratch / "filtered" / "visual.f16.npy", mmap_mode="r")
    n, dim = vectors.shape
    folder = scratch / f"lance_{subvectors}.lance"
    kind = pa.list_(pa.float16(), dim)
    queries, lowest = truth(scratch)
    found: dict[str, Any] = {"sub_vectors": subvectors, "version": lance.__version__}

    def batches(rows: range) -> Iterator[pa.RecordBatch]:
        for start in range(rows.start, rows.stop, 16_384):
            part = np.asarray(vectors[start % n : min(start % n + 16_384, n)])
            part = part[: rows.stop - start]
            flat = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), type=kind)
            ids = pa.array(range(start, start + len(part)), pa.int64())
            yield pa.record_batch([ids, flat], names=["id", "vector"])

    schema = pa.schema([("id", pa.int64()), ("vector", kind)])
    with timed(found, "write"):
        reader = pa.RecordBatchReader.from_batches(schema, batches(range(n)))
        lance.write_dataset(reader, str(folder), mode="overwrite")
    data = lance.dataset(str(folder))
    found["vectors_mb"] = size_mb(folder)
    with timed(found, "build"):
        data.create_index(
            "vector", "IVF_PQ", metric="dot", num_partitions=max(1, n // 4096),
            num_sub_vectors=subvectors,
        )  # fmt: skip
    found["peak_build_mb"], found["size_mb"] = peak_mb(), size_mb(folder)

    def ask(data: Any, nprobes: int, refine: int) -> list:
        return [
            data.to_table(
                columns=["id", "_distance"],
                nearest={
                    "column": "vector", "q": query.astype(np.float16), "k": K,
                    "nprobes": nprobes, "refine_factor": refine,
                },
            )["id"].to_numpy()
            for query in queries
        ]  # fmt: skip

    with timed(found, "open"):
        data = lance.dataset(str(folder))
        nearest = {"column": "vector", "q": queries[0], "k": 1}
        data.to_table(columns=["id", "_distance"], nearest=nearest)
    partitions = max(1, n // 4096)
    probes = sorted({min(2**i, partitions) for i in range(12)})
    tried = []
    for refine, nprobes in product((1, 2, 4, 8), probes):
        before: dict[str, Any] = {"nprobes": nprobes, "refine_factor": refine}
        with timed(before, "ask"):
            ids = ask(data, nprobes, refine)
        before["recall"] = round(recall(vectors, queries, ids, lowest), 4)
        before["ms_a_query"] = round(1e3 * before["ask_s"] / len(queries), 3)
        before["cpu_ms_a_query"] = round(1e3 * before["ask_cpu_s"] / len(queries), 3)
        tried.append(before)
        if before["recall"] >= TARGET:
            break  # more partitions at the same refinement only cost more
    found["tried"] = tried
    reached = [one for one in tried if one["recall"] >= TARGET]
    found["best"] = min(reached, key=lambda one: one["cpu_ms_a_query"]) if reached else None
    with timed(found, "delete"):
        data.delete(f"id < {n // 100}")
    with timed(found, "append"):
        extra = pa.RecordBatchReader.from_batches(schema, batches(range(n, n + n // 20)))
        data = lance.write_dataset(extra, str(folder), mode="append")
    with timed(found, "index_appended"):
        data.optimize.optimize_indices()
    found["grown_mb"] = size_mb(folder)
    best = found["best"] or tried[-1]
    with timed(found, "ask_grown"):
        ids = ask(lance.dataset(str(folder)), best["nprobes"], best["refine_factor"])
    found["deleted_returned"] = int(sum((np.asarray(i) < n // 100).sum() for i in ids))
    return found


def our_side(scratch: Path) -> dict[str, Any]:
    import faiss

    from ovref.reduce.indexing import build_indexes, tune_indexes
    from ovref.reduce.int8 import write_in_int8
    from ovref.reduce.phases import in_process
    from ovref_inference.collection import format as fmt
    from ovref_inference.collection.index import search

    filtered, out = scratch / "filtered", scratch / "ours"
    out.mkdir(exist_ok=True)
    queries, lowest = truth(scratch)
    vectors = np.load(filtered / "visual.f16.npy", mmap_mode="r")
    n = len(vectors)
    nothing = np.zeros(0, np.int64)
    found: dict[str, Any] = {"faiss": faiss.__version__}
    alone = scratch / "visual_alone"  # Lance indexes one column, so the other one is made small
    alone.mkdir(exist_ok=True)
    if not (alone / fmt.FILES["visual"]).exists():
        os.link(filtered / fmt.FILES["visual"], alone / fmt.FILES["visual"])
        fmt.write_vectors(alone / fmt.FILES["textual"], vectors[:1000])
    quiet = lambda *_: None  # noqa: E731
    with timed(found, "build"):
        built = build_indexes(alone, out, seed=0, grown={}, run_tasks=in_process, report=quiet)
    nouns = scratch / "nouns.parquet"
    texts = np.load(filtered / "texts.npy")[:512]
    fmt.write_table(nouns, fmt.NOUN_SCHEMA, {
        "noun": [f"{i:04d}" for i in range(len(texts))], "count": [1] * len(texts),
        "embedding": list(texts), "prototype_start": [0] * len(texts),
        "prototype_stop": [0] * len(texts), "neighbours": [[]] * len(texts),
    })  # fmt: skip
    with timed(found, "tune"):
        tuned = tune_indexes(
            alone, out, nouns, built, recall=TARGET, seed=0, deleted=nothing, run_tasks=in_process,
            report=quiet,
        )  # fmt: skip
    found["peak_build_mb"] = peak_mb()
    whole = scratch / "whole.faiss"
    os.replace(out / fmt.FILES["visual_index"], whole)
    os.link(whole, out / fmt.FILES["visual_index"])
    with timed(found, "convert"):
        small = write_in_int8(alone, out, tuned, seed=0, deleted=nothing)
    matrices = {
        "float16": alone / fmt.FILES["visual"], "int8": out / fmt.INT8_FILES["visual"],
    }  # fmt: skip
    indexes = {"float16": (whole, tuned), "int8": (out / fmt.FILES["visual_index"], small)}
    for kind, (path, infos) in indexes.items():
        (point,) = [at for at in infos["visual"]["curve"] if at["k"] == K]
        one: dict[str, Any] = {
            "size_mb": round((path.stat().st_size + matrices[kind].stat().st_size) / 1e6, 1),
            "nprobe": point["nprobe"], "promised": point["recall"],
            "curve": [(at["k"], at["nprobe"], at["recall"]) for at in infos["visual"]["curve"]],
        }  # fmt: skip
        with timed(one, "open"):
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
            search(index, queries[:1], 1, nprobe=1)
        for _ in range(2):
            with timed(one, "ask"):
                ids = [search(index, q[None], K, nprobe=point["nprobe"])[1][0] for q in queries]
        one["recall"] = round(recall(vectors, queries, ids, lowest), 4)
        one["ms_a_query"] = round(1e3 * one["ask_s"] / len(queries), 3)
        one["cpu_ms_a_query"] = round(1e3 * one["ask_cpu_s"] / len(queries), 3)
        gone = np.arange(n // 100)
        with timed(one, "ask_deleted"):
            for query in queries:
                search(index, query[None], K, nprobe=point["nprobe"], excluded=gone)
        found[kind] = one
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--references", type=int, default=200_000)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--lance", required=True, help="Python of an environment with pylance")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    scratch, n = arguments.scratch, arguments.references
    if arguments.only:
        part, _, subvectors = arguments.only.partition(":")
        found = our_side(scratch) if part == "ours" else lance_side(scratch, int(subvectors))
        (scratch / f"{arguments.only.replace(':', '_')}.json").write_text(json.dumps(found))
        return
    filtered = scratch / "filtered"
    if not filtered.exists():
        from ovref_inference.collection.index import exact_search
        from reduce_million import make

        filtered.mkdir(parents=True)
        make(filtered, n, n // 20, 768)
        queries = np.load(filtered / "visual_queries.npy")[:ASKED].astype(np.float32)
        vectors = np.load(filtered / "visual.f16.npy", mmap_mode="r")
        np.save(scratch / "lowest.npy", exact_search(vectors, queries, K)[0][:, K - 1])
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "references": n, "width": 768, "k": K, "target": TARGET, "queries": ASKED,
    }  # fmt: skip
    for part, python in (
        ("ours", sys.executable), ("lance:48", arguments.lance), ("lance:192", arguments.lance)
    ):  # fmt: skip
        path = scratch / f"{part.replace(':', '_')}.json"
        if not path.exists():
            subprocess.run([python, __file__, *sys.argv[1:], "--only", part], check=True)
        report[part] = json.loads(path.read_text())
        (HERE / "results" / f"lance_{n}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
