"""autofaiss and a loop of faiss k-means against a reduction in partitions, of the same references.

    python tests/benchmarks/reduce_partitioned.py --references 5000000 --nouns 200000 \\
        --partition 320000 --only partitioned --keep --spare-disk --scratch SCRATCH
    python tests/benchmarks/autofaiss_partitioned.py --scratch SCRATCH --autofaiss VENV/bin/python

autofaiss makes one index over all visual and one over all textual embeddings, as in
`reduce_million.py`: inverted lists of whole vectors on one thread, here in float16, since float32
needs up to 31 GB of memory at five million. Its loop of k-means clusters, for each noun, the
vectors that ovref clustered. The second command copies the embeddings out of the shards first: call
it with `--only matrices` while the first one waits, for that one deletes the shards.

Recall at 10 to 350 neighbours is measured against exact search with 1,024 visual embeddings that no
index stores and 1,024 class names. ovref searches all partitions as `ReferenceCollection` does; the
other side takes the smallest power of two as `nprobe` that reaches 0.95 on these very queries.
Writes results/autofaiss_partitioned_<references>x<width>.json.
"""

import argparse
import json
import os
import platform
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


def copy_matrices(scratch: Path) -> None:
    """Both embeddings of all shards, in the order of the shards, as `reduce_million.make`'s."""
    import pyarrow.parquet as pq

    from ovref_inference.collection import format as fmt

    shards = sorted((scratch / "references").glob("*.parquet"))
    rows = sum(pq.read_metadata(path).num_rows for path in shards)
    folder = scratch / "filtered"
    folder.mkdir()
    for role in ROLES:
        width = pq.read_schema(shards[0]).field(role).type.list_size
        with fmt.VectorWriter(folder / fmt.FILES[role], rows, width) as matrix:
            for path in shards:
                for chunk in pq.read_table(path, columns=[role])[role].chunks:
                    matrix.append(chunk.flatten().to_numpy().reshape(-1, width))
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


def ours_searched(scratch: Path, lowest: dict[str, np.ndarray]) -> dict[str, Any]:
    """Recall of a search of all partitions, as `reduce_million.recalls` counts it."""
    from ovref_inference import ReferenceCollection

    found: dict[str, Any] = {}
    with ReferenceCollection.open(scratch / "partitioned") as collection:
        search = {"visual": collection.search_regions, "textual": collection.search_text}
        for role in ROLES:
            queries = np.load(scratch / "filtered" / f"{role}_queries.npy")
            found[role] = {}
            for k in KS:
                began = time.process_time()
                support = search[role](queries, k)
                spent = time.process_time() - began
                least = lowest[role][:, k - 1, None] - 1e-6
                of_each = ((support.ids >= 0) & (support.scores >= least)).mean(axis=1)
                worst = np.sort(of_each)[: -(-len(of_each) // 10)]
                found[role][k] = {
                    "recall": float(of_each.mean()), "worst_tenth": float(worst.mean()),
                    "ms_per_query": 1e3 * spent / len(queries),
                }  # fmt: skip
    return found


def exact_scores(scratch: Path) -> dict[str, np.ndarray]:
    """(queries, 350) scores of each query's true neighbours."""
    from ovref_inference.collection.index import exact_search

    found = {}
    for role in ROLES:
        path = scratch / f"{role}_exact.npy"
        if not path.exists():
            vectors = np.load(scratch / "filtered" / f"{role}.f16.npy", mmap_mode="r")
            queries = np.load(scratch / "filtered" / f"{role}_queries.npy")
            np.save(path, exact_search(vectors, queries, max(KS))[0])
        found[role] = np.load(path)
    return found


def report(scratch: Path) -> None:
    """Writes what has been measured so far."""
    lowest = exact_scores(scratch)
    took = json.loads((scratch / "partitioned.json").read_text())
    vectors = np.load(scratch / "filtered" / "visual.f16.npy", mmap_mode="r")
    searched = scratch / "ours_searched.json"
    if not searched.exists():
        searched.write_text(json.dumps(ours_searched(scratch, lowest)))
    found: dict[str, Any] = {
        "references": len(vectors), "width": vectors.shape[1],
        "machine": f"{processor()}, {os.cpu_count()} cores", "python": platform.python_version(),
        "faiss": faiss.__version__, "commit": commit(),
        "ours": {"cpu_s": took["cpu_s"], "searched": json.loads(searched.read_text())},
    }  # fmt: skip
    theirs: dict[str, Any] = {}
    for role in ROLES:
        path = scratch / f"theirs_{role}.json"
        if not path.exists():
            continue
        theirs[role] = json.loads(path.read_text())
        queries = np.load(scratch / "filtered" / f"{role}_queries.npy")
        index = scratch / "theirs" / f"{role}.faiss"
        theirs[role]["searched"] = {
            k: recalls(queries, lowest[role][:, k - 1], index, k, None) for k in KS
        }
    if (path := scratch / "theirs_prototypes.json").exists():
        theirs["prototypes"] = json.loads(path.read_text())
        cosines: dict[str, list[float]] = {"ours": [], "theirs": []}
        for folder in sorted((scratch / "supports").iterdir()):
            visual = np.load(folder / "visual.f16.npy", mmap_mode="r")
            for side, name in (("ours", "prototypes.f16.npy"), ("theirs", "prototypes.npy")):
                made = np.load(folder / name, mmap_mode="r")
                cosines[side].append(objective(visual, folder, made))
        found["mean_cosine"] = {side: float(np.mean(each)) for side, each in cosines.items()}
    found["theirs"] = theirs
    if len(theirs) == 3:
        theirs["cpu_s"] = sum(part["cpu_s"] for part in theirs.values())
        found["cpu_ratio"] = theirs["cpu_s"] / took["cpu_s"]
    out = HERE / "results" / f"autofaiss_partitioned_{len(vectors)}x{vectors.shape[1]}.json"
    out.write_text(json.dumps(_rounded(found), indent=1) + "\n")
    print(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, required=True, help="of reduce_partitioned.py")
    parser.add_argument("--autofaiss", metavar="PYTHON", help="of an environment with autofaiss")
    parser.add_argument("--memory", default="18GB", help="that autofaiss is told to have")
    parser.add_argument(
        "--only", choices=("matrices", "supports", *ROLES, "prototypes", "report"),
        help="one part; those before it must be there",
    )  # fmt: skip
    arguments = parser.parse_args()
    scratch, only = arguments.scratch, arguments.only
    if only in (*ROLES, "prototypes"):
        work = {
            "prototypes": lambda: cluster(scratch),
            **{
                role: lambda role=role: their_index(
                    scratch / "filtered", scratch / "theirs", role, memory=arguments.memory,
                    float16=True,
                )
                for role in ROLES
            },
        }[only]  # fmt: skip
        (scratch / f"theirs_{only}.json").write_text(json.dumps(measured(work)))
    elif only is not None:
        {"matrices": copy_matrices, "supports": copy_supports, "report": report}[only](scratch)
    else:
        for part, done in (
            ("matrices", "filtered"), ("supports", "supports"), ("visual", "theirs_visual.json"),
            ("textual", "theirs_textual.json"), ("prototypes", "theirs_prototypes.json"),
            ("report", "report"),
        ):  # fmt: skip
            python = arguments.autofaiss if done.startswith("theirs") else sys.executable
            if not (scratch / done).exists():
                subprocess.run([python, __file__, *sys.argv[1:], "--only", part], check=True)


if __name__ == "__main__":
    main()
