"""Indexes and prototypes of a large collection, against autofaiss and a loop of faiss k-means.

    python tests/benchmarks/reduce_million.py --references 100000 --nouns 5000 \\
        --scratch SCRATCH --autofaiss VENV/bin/python

Both start from the same two matrices of float16 embeddings and end with two indexes and ten
prototypes a noun; both cluster the same vectors for each noun, and the search for a rare noun's
neighbours is counted for ovref alone. autofaiss (in an environment of its own) is asked for
memory-mapped indexes by inner product and gets 8 GB to make them, since it refuses with less. It is
given the inverted file of whole vectors that it would choose by itself for up to a million of them:
for more it chooses product quantisation, whose codes lose a third of the neighbours. It and its
loop of k-means run on one thread, since threads that wait for each other burn CPU seconds too.

Recall at 10 to 350 neighbours is measured against exact search with the queries of later use:
1,024 visual embeddings that were drawn with the others and are stored in neither index, and 1,024
class names, the text embeddings of nouns. ovref takes the nprobe that it tuned for itself (for
class names on a sample of the same nouns), the other one the smallest power of two that reaches
0.95 on these very queries.

The references are synthetic: nouns in topics, with eight ways to look, in long-tailed numbers.
Times are CPU seconds of all processes together, since wall clocks tell nothing on a busy machine.
Memory is the largest sum of the proportional set sizes of the process and its workers, sampled.
Writes results/reduce_<references>x<width>.json, first with this side alone.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from machine import commit, resident_mb

os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}

import faiss
import numpy as np

HERE = Path(__file__).parent
QUERIES, KS, TARGET = 1024, (10, 20, 70, 150, 350), 0.95


Block = tuple[list[str], np.ndarray, np.ndarray]


BLOCK = 65_536
"""References that are drawn at a time."""


def drawn(folder: Path, references: int, nouns: int, width: int, first: int = 0) -> Iterator[Block]:
    """The nouns of a block of references at a time, and their visual and textual embeddings.

    Writes the nouns' text embeddings and, at the end, queries.

    Args:
        first: number of references to leave out, a multiple of BLOCK.
    """
    from ovref_inference.vectors import l2_normalised

    rng = np.random.default_rng(0)
    topics = rng.standard_normal((max(1, nouns // 50), width), dtype=np.float32)
    topic_of = rng.integers(len(topics), size=nouns)
    looks = topics[topic_of] + 0.8 * rng.standard_normal((nouns, width), dtype=np.float32)
    texts = topics[topic_of] + 0.6 * rng.standard_normal((nouns, width), dtype=np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    modes = rng.standard_normal((4096, width), dtype=np.float32)
    weights = 1 / (np.arange(nouns) + 30)
    noun_of = rng.choice(nouns, size=references, p=weights / weights.sum())
    noun_of[:nouns] = rng.permutation(nouns)[:references]  # each at least once
    names = [f"noun {number:06d}" for number in range(nouns)]
    np.save(folder / "texts.npy", texts)

    def draw(of: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """References of these nouns."""
        n = len(of)
        look = (of * 8 + rng.integers(8, size=n)) * 2654435761 % len(modes)
        x = looks[of] + 0.7 * modes[look]
        x += 0.9 * rng.standard_normal((n, width), dtype=np.float32)
        captions = 0.9 * texts[of]
        captions += 0.1 * rng.standard_normal((n, width), dtype=np.float32) / width**0.5
        return l2_normalised(x), l2_normalised(captions)

    for start in range(first, references, BLOCK):
        of = noun_of[start : start + BLOCK]
        yield [names[i] for i in of], *draw(of, np.random.default_rng([1, start]))
    others = rng.choice(nouns, size=QUERIES, p=weights / weights.sum())
    np.save(folder / "visual_queries.npy", draw(others, rng)[0])
    asked = rng.choice(nouns, size=min(QUERIES, nouns), replace=False)
    np.save(folder / "textual_queries.npy", texts[asked])


def columns_of(nouns: list[str], start: int) -> dict[str, Any]:
    """The columns of references that do not matter here; `start` is the id of the first."""
    n = len(nouns)
    ids = range(start, start + n)
    zeros = ("span_start", "span_end", "x0", "y0", "x1", "y1")
    return {
        "id": ids, "key": [f"{i:024x}#0" for i in ids], "noun": nouns,
        "caption": [f"a {noun}" for noun in nouns],
        **{name: np.zeros(n, np.int32) for name in zeros}, "area": np.ones(n),
        "score": np.ones(n), "source": ["daam"] * n, "shard": ["000000000000/00000"] * n,
        "seed": [None] * n,
    }  # fmt: skip


def make(folder: Path, references: int, nouns: int, width: int) -> None:
    """The folder as the reduction's filter leaves it, the nouns' text embeddings, and queries."""
    from ovref_inference.collection import format as fmt

    at = 0
    with (
        fmt.TableWriter(folder / fmt.FILES["references"], fmt.REFERENCE_SCHEMA) as table,
        fmt.VectorWriter(folder / fmt.FILES["visual"], references, width) as visual,
        fmt.VectorWriter(folder / fmt.FILES["textual"], references, width) as textual,
    ):
        for names, of_images, of_captions in drawn(folder, references, nouns, width):
            visual.append(of_images)
            textual.append(of_captions)
            table.append(columns_of(names, at))
            at += len(names)


class Texts:
    """Gives each noun the embedding that was drawn for it."""

    def __init__(self, embeddings: np.ndarray) -> None:
        self._embeddings = embeddings

    def encode(self, texts: list[str]) -> np.ndarray:
        return self._embeddings[[int(text.rpartition(" ")[2]) for text in texts]]


def ours(folder: Path, out: Path, workers: int) -> dict[str, Any]:
    """ovref's phases `index` and `prototypes`, spread over worker processes, then published."""
    from ovref.reduce.indexing import build_indexes, tune_indexes
    from ovref.reduce.noun_prototypes import build_prototypes
    from ovref_inference.collection import format as fmt
    from ovref_inference.collection import store
    from ovref_inference.collection.prototypes import PrototypeConfig

    config, report, times = PrototypeConfig(), lambda *event: None, {}
    phases = [out.with_name(f"{out.name}_{phase}") for phase in ("index", "prototypes")]
    for place in (out, *phases):
        place.mkdir()
    began = time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        run = lambda tasks: pool.map(_call, tasks)  # noqa: E731
        indexes = build_indexes(folder, phases[0], seed=0, grown={}, run_tasks=run, report=report)
        times["index_s"] = time.monotonic() - began
        summary = build_prototypes(
            folder, phases[1], config=config, grown=None, deleted=np.zeros(0, np.int64),
            texts=Texts(np.load(folder / "texts.npy")), templates=("{}",), run_tasks=run,
            report=report,
        )  # fmt: skip
        at = time.monotonic()
        indexes = tune_indexes(
            folder, phases[0], phases[1] / fmt.FILES["nouns"], indexes, recall=TARGET, seed=0,
            deleted=np.zeros(0, np.int64), run_tasks=run, report=report,
        )  # fmt: skip
        times["tune_s"] = time.monotonic() - at
    times["wall_s"] = time.monotonic() - began
    for name in fmt.FILES.values():
        for place in (folder, *phases):
            if (place / name).exists():
                os.link(place / name, out / name)
    fmt.write_table(
        out / fmt.FILES["tombstones"], fmt.TOMBSTONE_SCHEMA, fmt.tombstone_columns([], "")
    )
    width = fmt.open_vectors(out / fmt.FILES["visual"]).shape[1]
    encoder = fmt.EncoderInfo(model="synthetic", revision="", dim=width)
    store.publish(out, str(out), fmt.Manifest(
        fingerprint="0" * 64, visual=encoder, textual=encoder, templates=("{}",),
        weights=(0.9, 0.1), visual_index=fmt.index_info(indexes["visual"]),
        textual_index=fmt.index_info(indexes["textual"]), prototypes=asdict(config),
    ))  # fmt: skip
    counts = {name: summary[name] for name in ("nouns", "rare_nouns", "prototypes")}
    return times | {"index": indexes} | counts


def their_index(
    folder: Path, out: Path, role: str, *, memory: str = "8GB", float16: bool = False
) -> dict[str, Any]:
    """autofaiss' index over one matrix; runs in autofaiss' environment.

    Args:
        memory: limit given to autofaiss as `current_memory_available`.
        float16: store vectors as float16, in half the memory, which autofaiss does not offer for
            inner products: what makes its empty index is replaced, and nothing else.
    """
    from autofaiss import build_index
    from autofaiss.indices import training

    def in_float16(dim: int, key: str, metric: int) -> Any:
        index = faiss.index_factory(dim, key.replace("Flat", "SQfp16"), metric)
        index.by_residual = False  # a difference to a centroid would be rounded once more
        return index

    if float16:
        training.index_factory = in_float16
    source = out / f"{role}_embeddings"
    source.mkdir(parents=True)
    os.link(folder / f"{role}.f16.npy", source / "0.npy")
    n = len(np.load(source / "0.npy", mmap_mode="r"))
    _, infos = build_index(
        str(source), index_path=str(out / f"{role}.faiss"),
        index_infos_path=str(out / f"{role}.json"), metric_type="ip",
        index_key=f"IVF{2 ** round(np.log2(4 * n**0.5))},Flat",
        should_be_memory_mappable=True, max_index_memory_usage="4GB",
        current_memory_available=memory, nb_cores=1, verbose=30,
    )  # fmt: skip
    return {key: infos[key] for key in ("index_key", "index_param") if key in infos}


def their_prototypes(folder: Path, out: Path, collection: Path) -> None:
    """A loop of faiss k-means over nouns."""
    faiss.omp_set_num_threads(1)
    vectors = np.load(folder / "visual.f16.npy", mmap_mode="r")
    rows = np.load(collection / "support_rows.npy", mmap_mode="r")
    starts = np.load(collection / "support_starts.npy")
    prototypes = []
    for start, stop in pairwise(starts):
        x = vectors[rows[start:stop]].astype(np.float32)
        if len(x) > 10:
            kmeans = faiss.Kmeans(
                x.shape[1], 10, niter=20, spherical=True, seed=0, min_points_per_centroid=1,
                max_points_per_centroid=len(x),
            )  # fmt: skip
            kmeans.train(x)
            x = kmeans.centroids
        prototypes.append(x)
    np.save(out / "prototypes.npy", np.concatenate(prototypes).astype(np.float16))


def supports(collection: Path) -> None:
    """For every noun the rows that ovref clustered, for the other side to cluster too."""
    from ovref_inference import ReferenceCollection
    from ovref_inference.collection.prototypes import clustered_rows

    with ReferenceCollection.open(collection) as opened:
        every = []
        for row in range(len(opened.nouns)):
            ids = opened._nouns.references_of([row, *opened._nouns.neighbours(row)])
            every.append(clustered_rows(np.sort(np.concatenate(ids)), opened.prototype_config))
    np.save(collection / "support_starts.npy", np.cumsum([0, *map(len, every)]))
    np.save(collection / "support_rows.npy", np.concatenate(every).astype(np.int32))


def recalls(
    queries: np.ndarray, lowest: np.ndarray, path: Path, k: int, nprobe: int | None
) -> dict[str, float]:
    """Recall@k at the given nprobe, or at the smallest power of two that reaches 0.95.

    Args:
        lowest: (queries,) the score of each query's k-th true neighbour.
    """
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    for value in [nprobe] if nprobe else [2**i for i in range(20) if 2**i <= index.nlist]:
        began = time.process_time()
        scores, ids = index.search(queries, k, params=faiss.SearchParametersIVF(nprobe=value))
        spent = time.process_time() - began
        of_each = ((ids >= 0) & (scores >= lowest[:, None] - 1e-6)).mean(axis=1)
        if of_each.mean() >= TARGET:
            break
    worst = np.sort(of_each)[: -(-len(of_each) // 10)]
    return {
        "nprobe": value, "recall": float(of_each.mean()), "worst_tenth": float(worst.mean()),
        "ms_per_query": 1e3 * spent / len(queries),
    }  # fmt: skip


def objective(vectors: np.ndarray, collection: Path, prototypes: np.ndarray) -> float:
    """Mean cosine of a clustered vector with its noun's nearest prototype, over 500 nouns."""
    rows = np.load(collection / "support_rows.npy", mmap_mode="r")
    starts = np.load(collection / "support_starts.npy")
    sizes = np.minimum(np.diff(starts), 10)
    stops = np.cumsum(sizes)
    cosines = []
    for noun in np.random.default_rng(0).permutation(len(sizes))[:500]:
        x = vectors[rows[starts[noun] : starts[noun + 1]]].astype(np.float32)
        own = prototypes[stops[noun] - sizes[noun] : stops[noun]].astype(np.float32)
        cosines.append(float((x @ own.T).max(axis=1).mean()))
    return float(np.mean(cosines))


def open_and_ask(collection: Path, classes: int = 171) -> dict[str, float]:
    """What opening and asking for prototypes costs a process that does nothing else."""
    from ovref_inference import ReferenceCollection

    before = _pss(os.getpid())
    began, began_cpu = time.perf_counter(), time.process_time()
    opened = ReferenceCollection.open(collection)
    found = {
        "open_s": time.perf_counter() - began, "open_cpu_s": time.process_time() - began_cpu,
        "imports_mb": before / 1e6, "resident_mb": resident_mb(),
    }  # fmt: skip
    names = [opened.nouns[i] for i in np.random.default_rng(0).permutation(len(opened.nouns))]
    began, began_cpu = time.perf_counter(), time.process_time()
    opened.prototypes(names[:classes])
    found |= {
        f"prototypes_of_{classes}_s": time.perf_counter() - began,
        f"prototypes_of_{classes}_cpu_s": time.process_time() - began_cpu,
        "resident_after_mb": resident_mb(),
    }
    return found


def measured(work: Callable[[], Any]) -> dict[str, Any]:
    """What `work` returns, with CPU seconds and peak memory of this process and its children."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            peak[0] = max(peak[0], sum(map(_pss, _family(os.getpid()))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        found = work()
    finally:
        done.set()
        watcher.join()
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return (found or {}) | {
        "cpu_s": sum(usage.ru_utime + usage.ru_stime for usage in usages),
        "peak_pss_gb": peak[0] / 1e9,
        "max_rss_of_one_process_gb": max(usage.ru_maxrss for usage in usages) * 1024 / 1e9,
    }


def main() -> None:
    arguments = _arguments()
    scratch, n = arguments.scratch, arguments.references
    filtered, collection = scratch / "filtered", scratch / "collection"
    if arguments.only:
        others = scratch / "theirs"
        work = {
            "ours": lambda: ours(filtered, collection, arguments.workers),
            "visual": lambda: their_index(filtered, others, "visual"),
            "textual": lambda: their_index(filtered, others, "textual"),
            "prototypes": lambda: their_prototypes(filtered, others, collection),
            "open": lambda: open_and_ask(collection),
        }[arguments.only]
        found = measured(work) if arguments.only != "open" else work()
        (scratch / f"{arguments.only}.json").write_text(json.dumps(found))
        return
    scratch.mkdir(parents=True, exist_ok=True)
    if not filtered.exists():
        filtered.mkdir()
        make(filtered, n, arguments.nouns, arguments.width)
    report: dict[str, Any] = {
        "references": n, "nouns": arguments.nouns, "width": arguments.width,
        "workers": arguments.workers, "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "faiss": faiss.__version__, "commit": commit(),
        "ours": _child(sys.executable, "ours", scratch),
    }  # fmt: skip
    report["open"] = _child(sys.executable, "open", scratch)
    write(report, scratch)
    supports(collection)
    if arguments.autofaiss:
        parts = {
            part: _child(arguments.autofaiss, part, scratch)
            for part in ("visual", "textual", "prototypes")
        }
        report["theirs"] = {
            "index": {role: parts[role] for role in ("visual", "textual")},
            "prototypes": parts["prototypes"],
            "cpu_s": sum(part["cpu_s"] for part in parts.values()),
        }
        report["cpu_ratio"] = report["theirs"]["cpu_s"] / report["ours"]["cpu_s"]
    write(report, scratch)


def write(report: dict[str, Any], scratch: Path) -> None:
    """The report so far, with what searching its indexes and its prototypes are worth."""
    from ovref_inference.collection.index import exact_search

    sides = {"ours": scratch / "collection", "theirs": scratch / "theirs"}
    sides = {side: folder for side, folder in sides.items() if side in report}
    for role in ("visual", "textual"):
        vectors = np.load(scratch / "filtered" / f"{role}.f16.npy", mmap_mode="r")
        queries = np.load(scratch / "filtered" / f"{role}_queries.npy")
        exact, _ = exact_search(vectors, queries, max(KS))
        for side, folder in sides.items():
            index = report[side]["index"][role]
            tuned = {point["k"]: point["nprobe"] for point in index.get("curve", ())}
            index["searched"] = {
                k: recalls(queries, exact[:, k - 1], folder / f"{role}.faiss", k, tuned.get(k))
                for k in KS
            }
    if "theirs" in sides:
        vectors = np.load(scratch / "filtered" / "visual.f16.npy", mmap_mode="r")
        for side, name in (("ours", "prototypes.f16.npy"), ("theirs", "prototypes.npy")):
            made = np.load(sides[side] / name, mmap_mode="r")
            report[side]["mean_cosine"] = objective(vectors, sides["ours"], made)
    path = HERE / "results" / f"reduce_{report['references']}x{report['width']}.json"
    path.write_text(json.dumps(_rounded(report), indent=1) + "\n")
    print(path.read_text())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--references", type=int, default=100_000)
    parser.add_argument("--nouns", type=int, default=5_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--autofaiss", metavar="PYTHON", help="of an environment with autofaiss")
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir(), "ovref_reduce_million")
    )
    parser.add_argument(
        "--only", choices=("ours", "open", "visual", "textual", "prototypes"),
        help="runs one part after those before it, and keeps its figures in the folder",
    )  # fmt: skip
    return parser.parse_args()


def _call(task: Callable[[], Any]) -> Any:
    return task()


def _child(python: str, only: str, scratch: Path) -> dict[str, Any]:
    """What a process of its own found, now or in an earlier run with the same folder."""
    path = scratch / f"{only}.json"
    if not path.exists():
        subprocess.run([python, __file__, *sys.argv[1:], "--only", only], check=True)
    return json.loads(path.read_text())


def _family(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        found = [int(child) for child in children.read_text().split()]
    except OSError:
        return []
    return [pid, *(member for child in found for member in _family(child))]


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
