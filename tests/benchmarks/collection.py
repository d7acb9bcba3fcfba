"""How long a collection takes to index, open and ask, and how many neighbours its index finds.

    python tests/benchmarks/collection.py [references] [width]

Embeddings are random but clustered, as nouns are. Times are CPU seconds of this process, so that
they mean the same on a busy machine; with one thread they are also what a user waits at most.
Writes tests/benchmarks/results/collection_<references>x<width>.json.
"""

import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np

from ovref_inference import ReferenceCollection
from ovref_inference.collection import format as fmt
from ovref_inference.collection import index as indexes
from ovref_inference.collection import store
from ovref_inference.collection.prototypes import PrototypeConfig, make_prototypes
from ovref_inference.vectors import l2_normalised

PER_NOUN = 100


def main(n: int, dim: int) -> None:
    rng = np.random.default_rng(0)
    nouns = [f"noun {i:06d}" for i in range(n // PER_NOUN)]
    n = len(nouns) * PER_NOUN
    noun_of = rng.permutation(np.repeat(np.arange(len(nouns)), PER_NOUN))
    centres = rng.standard_normal((len(nouns), dim))
    noise = rng.standard_normal((n, dim))
    vectors = l2_normalised(centres[noun_of] + noise).astype(np.float16)
    config = PrototypeConfig()
    report: dict[str, object] = {
        "references": n, "width": dim, "nouns": len(nouns), "machine": platform.machine(),
        "faiss": faiss.__version__, "numpy": np.__version__,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "files")
        folder.mkdir()

        start = time.process_time()
        index = indexes.build_index(vectors)
        report["build_index_s"] = time.process_time() - start
        start = time.process_time()
        curve = indexes.tune(index, indexes.RecallQueries.of_rows(vectors))
        report["tune_s"] = time.process_time() - start
        factory = indexes.choose_index(n, dim)
        report |= {"factory": factory, "curve": [asdict(point) for point in curve]}
        info = fmt.IndexInfo(factory=factory, curve=curve)
        start = time.process_time()
        prototypes = [make_prototypes(vectors[noun_of == row], config) for row in range(len(nouns))]
        report["prototypes_ms_per_noun"] = 1e3 * (time.process_time() - start) / len(nouns)

        for kind in ("visual", "textual"):
            fmt.write_vectors(folder / fmt.FILES[kind], vectors)
            indexes.write_index(index, folder / fmt.FILES[f"{kind}_index"])
        fmt.write_vectors(folder / fmt.FILES["prototypes"], np.concatenate(prototypes))
        fmt.write_table(folder / fmt.FILES["references"], fmt.REFERENCE_SCHEMA, {
            "id": range(n), "key": [f"{i:024x}#0" for i in range(n)],
            "noun": [nouns[i] for i in noun_of], "caption": [f"a {nouns[i]}" for i in noun_of],
            **{name: np.zeros(n, dtype=np.int32)
               for name in ("span_start", "span_end", "x0", "y0", "x1", "y1")},
            "area": np.ones(n), "score": np.ones(n), "source": ["daam"] * n,
            "shard": ["00000"] * n, "seed": [None] * n,
        })  # fmt: skip
        stops = np.cumsum([len(p) for p in prototypes])
        fmt.write_table(folder / fmt.FILES["nouns"], fmt.NOUN_SCHEMA, {
            "noun": nouns, "count": [PER_NOUN] * len(nouns),
            "embedding": list(l2_normalised(centres)), "prototype_start": [0, *stops[:-1]],
            "prototype_stop": stops, "neighbours": [[]] * len(nouns),
        })  # fmt: skip
        fmt.write_table(
            folder / fmt.FILES["tombstones"], fmt.TOMBSTONE_SCHEMA, fmt.tombstone_columns([], "")
        )
        encoder = fmt.EncoderInfo(model="random", revision="", dim=dim)
        store.publish(folder, str(folder), fmt.Manifest(
            fingerprint="0" * 64, visual=encoder, textual=encoder, templates=("a {}.",),
            weights=(0.9, 0.1), visual_index=info, textual_index=info, prototypes=asdict(config),
        ))  # fmt: skip
        report["megabytes"] = sum(path.stat().st_size for path in folder.iterdir()) / 1e6

        start = time.process_time()
        collection = ReferenceCollection.open(folder)
        report["open_ms"] = 1e3 * (time.process_time() - start)
        queries, names = centres[:20], nouns[:20]
        for name, ask in {
            "search_text_20_classes_150_references_ms": lambda: collection.search_text(
                queries, 150
            ),
            "fossil_prototypes_20_classes_ms": lambda: collection.fossil_prototypes(
                queries, n=150, k=10
            ),
            "stored_prototypes_20_classes_ms": lambda: collection.prototypes(names),
            "search_100_regions_20_references_ms": lambda: (
                collection.search_regions(vectors[:100], 20).noun_rows
            ),
            "rows_of_10_references_ms": lambda: collection.rows(list(range(0, n, n // 10))[:10]),
        }.items():
            ask()
            start = time.process_time()
            for _ in range(5):
                ask()
            report[name] = 1e3 * (time.process_time() - start) / 5
        collection.close()
    path = Path(__file__).parent / "results" / f"collection_{n}x{dim}.json"
    path.parent.mkdir(exist_ok=True)
    rounded = {
        key: round(value, 4) if isinstance(value, float) else value for key, value in report.items()
    }
    path.write_text(json.dumps(rounded, indent=2) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main(*(int(value) for value in (*sys.argv[1:], "30000", "256")[:2]))
