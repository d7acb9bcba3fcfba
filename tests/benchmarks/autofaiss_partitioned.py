"""autofaiss and a loop of faiss k-means against a reduction in partitions, of the same references.

    python tests/benchmarks/reduce_partitioned.py --references 5000000 --nouns 200000 \\
        --partition 320000 --only partitioned --keep --spare-disk --scratch SCRATCH
    python tests/benchmarks/autofaiss_partitioned.py --scratch SCRATCH --autofaiss VENV/bin/python

autofaiss makes one index over all visual and one over all textual embeddings, in the order in which
they were drawn, as in `reduce_million.py`: inverted lists of whole vectors on one thread, here in
float16, since float32 needs up to 31 GB of memory at five million. Its loop of k-means clusters,
for each noun, the vectors that ovref clustered. SCRATCH needs as much disk again as the embeddings;
half of it with --spare-disk, which deletes each index once it was searched.

Recall at 10 to 350 neighbours is measured against exact search with 1,024 visual embeddings that no
index stores and 1,024 class names. ovref searches all partitions as `ReferenceCollection` does; the
other side takes the smallest power of two as `nprobe` that reaches 0.95 on these very queries.
Writes results/autofaiss_partitioned_<references>.json.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}

import faiss
import numpy as np

from machine import commit, processor
from reduce_million import (
    KS,
    _rounded,
    measured,
    objective,
    recalls,
    supports,
    their_index,
    their_prototypes,
)  # fmt: skip

HERE = Path(__file__).parent
ROLES = ("visual", "textual")


def copy_matrix(scratch: Path, role: str) -> None:
    """The embeddings of all partitions as one matrix in the order in which they were drawn, which
    their keys tell, and the queries."""
    import pyarrow.parquet as pq

    from ovref_inference.collection import format as fmt

    parts = sorted((scratch / "partitioned" / "partitions").iterdir())
    sources = [fmt.open_vectors(part / fmt.FILES[role]) for part in parts]
    shape = sum(map(len, sources)), sources[0].shape[1]
    folder = scratch / "filtered"
    folder.mkdir(exist_ok=True)
    path = folder / f"{role}.f16.npy"
    matrix = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    for part, source in zip(parts, sources, strict=True):
        keys = pq.read_table(part / fmt.FILES["references"], columns=["key"])["key"].to_pylist()
        drawn = np.array([int(key.partition("#")[0], 16) for key in keys])
        for start in range(0, len(drawn), 8192):
            matrix[drawn[start : start + 8192]] = source[start : start + 8192]
    matrix.flush()
    os.link(scratch / f"{role}_queries.npy", folder / f"{role}_queries.npy")


def copy_supports(scratch: Path) -> None:
    """For each partition a folder with its embeddings and the rows of each noun to cluster."""
    for part in sorted((scratch / "partitioned" / "partitions").iterdir()):
        folder = scratch / "supports" / part.name
        folder.mkdir(parents=True)
        for path in filter(Path.is_file, part.iterdir()):
            os.link(path, folder / path.name)
        supports(folder)


def cluster(scratch: Path) -> dict[str, Any]:
    for folder in sorted((scratch / "supports").iterdir()):
        their_prototypes(folder, folder, folder)
    return {}


def recall(scratch: Path, role: str) -> dict[str, Any]:
    """Recall of both sides at each k."""
    queries = np.load(scratch / "filtered" / f"{role}_queries.npy")
    lowest = exact_scores(scratch, role, queries)
    index = scratch / "theirs" / f"{role}.faiss"
    return {
        "ours": {k: our_recall(scratch, role, queries, lowest[:, k - 1], k) for k in KS},
        "theirs": {k: recalls(queries, lowest[:, k - 1], index, k, None) for k in KS},
    }


def exact_scores(scratch: Path, role: str, queries: np.ndarray) -> np.ndarray:
    """(queries, 350) scores of each query's true neighbours in all partitions, descending."""
    from ovref_inference.collection import format as fmt
    from ovref_inference.collection.index import exact_search

    found = [
        exact_search(fmt.open_vectors(part / fmt.FILES[role]), queries, max(KS))[0]
        for part in sorted((scratch / "partitioned" / "partitions").iterdir())
    ]
    return -np.sort(-np.concatenate(found, axis=1), axis=1)[:, : max(KS)]


def our_recall(
    scratch: Path, role: str, queries: np.ndarray, lowest: np.ndarray, k: int
) -> dict[str, float]:
    """As `reduce_million.recalls`, of a search of all partitions."""
    from ovref_inference import ReferenceCollection

    with ReferenceCollection.open(scratch / "partitioned") as collection:
        search = collection.search_regions if role == "visual" else collection.search_text
        began = time.process_time()
        support = search(queries, k)
        spent = time.process_time() - began
    of_each = ((support.ids >= 0) & (support.scores >= lowest[:, None] - 1e-6)).mean(axis=1)
    worst = np.sort(of_each)[: -(-len(of_each) // 10)]
    return {
        "recall": float(of_each.mean()), "worst_tenth": float(worst.mean()),
        "ms_per_query": 1e3 * spent / len(queries),
    }  # fmt: skip


def mean_cosines(scratch: Path) -> dict[str, float]:
    """Mean cosine of a clustered vector with its noun's nearest prototype, of both sides."""
    cosines: dict[str, list[float]] = {"ours": [], "theirs": []}
    for folder in sorted((scratch / "supports").iterdir()):
        visual = np.load(folder / "visual.f16.npy", mmap_mode="r")
        for side, name in (("ours", "prototypes.f16.npy"), ("theirs", "prototypes.npy")):
            made = np.load(folder / name, mmap_mode="r")
            cosines[side].append(objective(visual, folder, made))
    return {side: float(np.mean(each)) for side, each in cosines.items()}


def write_report(scratch: Path) -> None:
    """Writes what has been measured so far."""
    took = json.loads((scratch / "partitioned.json").read_text())
    parts = {
        part: json.loads(path.read_text())
        for part in (*ROLES, "prototypes")
        if (path := scratch / f"theirs_{part}.json").exists()
    }
    found: dict[str, Any] = {
        "references": took["references"], "nouns": took["nouns"],
        "machine": f"{processor()}, {os.cpu_count()} cores", "python": platform.python_version(),
        "faiss": faiss.__version__, "commit": commit(),
        "ours": {"cpu_s": took["cpu_s"]}, "theirs": parts,
    }  # fmt: skip
    for role in ROLES:
        if (path := scratch / f"recall_{role}.json").exists():
            found[f"recall_{role}"] = json.loads(path.read_text())
    if "prototypes" in parts:
        found["mean_cosine"] = mean_cosines(scratch)
    if len(parts) == 3:
        found["theirs"]["cpu_s"] = sum(part["cpu_s"] for part in parts.values())
        found["cpu_ratio"] = found["theirs"]["cpu_s"] / took["cpu_s"]
    out = HERE / "results" / f"autofaiss_partitioned_{took['references']}.json"
    out.write_text(json.dumps(_rounded(found), indent=1) + "\n")
    print(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, required=True, help="of reduce_partitioned.py")
    parser.add_argument("--autofaiss", metavar="PYTHON", help="of an environment with autofaiss")
    parser.add_argument("--memory", default="18GB", help="memory limit given to autofaiss")
    parser.add_argument("--spare-disk", action="store_true", help="see above")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    scratch = arguments.scratch
    if arguments.only:
        what, _, role = arguments.only.partition(":")
        if what == "matrix":
            copy_matrix(scratch, role)
        elif what == "index":
            folders = scratch / "filtered", scratch / "theirs"
            took = measured(
                lambda: their_index(*folders, role, memory=arguments.memory, float16=True)
            )
            (scratch / f"theirs_{role}.json").write_text(json.dumps(took))
        elif what == "recall":
            (scratch / f"recall_{role}.json").write_text(json.dumps(recall(scratch, role)))
        elif what == "supports":
            copy_supports(scratch)
        elif what == "cluster":
            took = measured(lambda: cluster(scratch))
            (scratch / "theirs_prototypes.json").write_text(json.dumps(took))
        return

    def run(part: str, done: str, python: str = sys.executable) -> None:
        if not (scratch / done).exists():
            subprocess.run([python, __file__, *sys.argv[1:], "--only", part], check=True)

    for role in ROLES:
        if not (scratch / f"theirs_{role}.json").exists():
            run(f"matrix:{role}", f"filtered/{role}.f16.npy")
            run(f"index:{role}", f"theirs_{role}.json", arguments.autofaiss)
        run(f"recall:{role}", f"recall_{role}.json")
        if arguments.spare_disk:
            (scratch / "filtered" / f"{role}.f16.npy").unlink(missing_ok=True)
            (scratch / "theirs" / f"{role}.faiss").unlink(missing_ok=True)
            shutil.rmtree(scratch / "theirs" / f"{role}_embeddings", ignore_errors=True)
    run("supports", "supports")
    run("cluster", "theirs_prototypes.json", arguments.autofaiss)
    write_report(scratch)


if __name__ == "__main__":
    main()
