"""What embeddings lose in 8 bits: a scale for each row against a scale for each dimension.

    python tests/benchmarks/int8.py --scratch SCRATCH [--references 100000]
    python tests/benchmarks/int8.py --collection runs/demo/collection

For the references of reduce_million.py and 256 queries that are not among them (visual embeddings;
class names), or for a collection in float16 and 200 of its rows, each searched for all the others:
mean length of the error, and recall of exact search among the rows in 8 bits at 10 to 350
neighbours. A returned row counts if by its float16 numbers it scores no worse than the k-th true
neighbour. Prints a table; figures are in results/int8.md.
"""

import argparse
import os
from pathlib import Path

os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}

import numpy as np

KS = (10, 20, 70, 150, 350)


def per_row(vectors_nd: np.ndarray) -> np.ndarray:
    """As collections store them."""
    from ovref_inference.collection.int8 import decode_rows, encode_rows

    return decode_rows(encode_rows(vectors_nd)).astype(np.float32)


def per_dimension(vectors_nd: np.ndarray) -> np.ndarray:
    """Steps of 1/127 of a dimension's largest magnitude."""
    largest_d = np.abs(vectors_nd).max(0)
    return np.rint(vectors_nd / largest_d * 127).clip(-127, 127) * (largest_d / 127)


def per_range(vectors_nd: np.ndarray) -> np.ndarray:
    """As faiss' SQ8 codes them: 256 steps from a dimension's lowest to its highest number."""
    lowest_d, width_d = vectors_nd.min(0), np.maximum(np.ptp(vectors_nd, axis=0), 1e-9)
    steps_nd = np.floor((vectors_nd - lowest_d) / width_d * 255).clip(0, 255)
    return lowest_d + (steps_nd + 0.5) / 255 * width_d


def compare(name: str, vectors_nd: np.ndarray, queries_md: np.ndarray) -> None:
    from ovref_inference.collection.index import exact_search

    most = max(k for k in KS if k < len(vectors_nd))
    exact, _ = exact_search(vectors_nd, queries_md, most)
    for way in (per_row, per_dimension, per_range):
        coded_nd = way(vectors_nd).astype(np.float32)
        error = np.linalg.norm(vectors_nd - coded_nd, axis=1).mean()
        _, ids = exact_search(coded_nd, queries_md, most)
        scores = np.einsum("mkd,md->mk", vectors_nd[ids], queries_md)
        found = [(scores[:, :k] >= exact[:, k - 1 : k] - 1e-6).mean() for k in KS if k <= most]
        figures = " | ".join(f"{recall:.4f}" for recall in found)
        print(f"| {name} | {way.__name__} | {error:.4f} | {figures} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--references", type=int, default=100_000)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--collection")
    arguments = parser.parse_args()
    print(f"| embeddings | scale | error | {' | '.join(f'@{k}' for k in KS)} |")
    if arguments.collection:
        from ovref_inference import ReferenceCollection

        with ReferenceCollection.open(arguments.collection) as opened:
            for role in ("visual", "textual"):
                vectors_nd = getattr(opened, role)[:].astype(np.float32)
                rows = np.random.default_rng(0).choice(len(vectors_nd), 200, replace=False)
                compare(role, vectors_nd, vectors_nd[rows])
        return
    from reduce_million import make

    folder = arguments.scratch / f"filtered_{arguments.references}"
    if not folder.exists():
        folder.mkdir(parents=True)
        make(folder, arguments.references, arguments.references // 20, 768)
    for role in ("visual", "textual"):
        vectors_nd = np.load(folder / f"{role}.f16.npy").astype(np.float32)
        compare(role, vectors_nd, np.load(folder / f"{role}_queries.npy")[:256])


if __name__ == "__main__":
    main()
