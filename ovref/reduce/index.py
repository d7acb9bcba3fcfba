"""Phase 3: an index over each kind of embedding, chosen by their number, its recall measured."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ovref_inference.format import FILES, IndexInfo, open_vectors
from ovref_inference.index import build_index, choose_index, tune, write_index

from ovref.reduce.phases import Report

RECALL_K = 10


def build_indexes(
    filtered: Path, out: Path, *, recall: float, seed: int, threads: int, report: Report
) -> dict[str, Any]:
    """Writes visual.faiss and textual.faiss into `out`; the summary holds an IndexInfo for each.

    Args:
        recall: recall@10 against exact search that the search parameters are chosen to reach; what
            was reached is in the summary.
        threads: of faiss. With 1 equal references give an equal index.
    """
    summary = {}
    for done, role in enumerate(("visual", "textual"), start=1):
        vectors = open_vectors(filtered / FILES[role])
        factory = choose_index(*vectors.shape)
        index = build_index(vectors, factory, seed=seed, threads=threads)
        search, measured = tune(index, vectors, k=RECALL_K, seed=seed, target=recall)
        info = IndexInfo(
            factory=factory, search=search, recall=measured, recall_k=RECALL_K if search else 0
        )
        write_index(index, out / FILES[f"{role}_index"])
        summary[role] = asdict(info)
        report("index", done, 2)
    return summary
