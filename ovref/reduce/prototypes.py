"""Phase 4: the vocabulary, and every noun's prototypes."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from ovref_inference.format import (
    FILES,
    NOUN_SCHEMA,
    TableWriter,
    VectorWriter,
    open_vectors,
)
from ovref_inference.prototypes import (
    PrototypeConfig,
    clustered_rows,
    make_prototypes,
    neighbours_of,
)
from ovref_inference.retrieve import Texts, class_embeddings

from ovref.reduce.phases import Report

_NOUNS_AT_ONCE = 256


def build_prototypes(
    filtered: Path,
    out: Path,
    *,
    config: PrototypeConfig,
    dead: np.ndarray,
    texts: Texts,
    templates: tuple[str, ...],
    report: Report,
) -> dict[str, Any]:
    """Writes nouns.parquet, sorted by noun, and prototypes.f16.npy into `out`.

    A noun with `config.needed` references or more is clustered alone, a rarer one together with
    its neighbours in text space (VOCSeg 3.1), by the functions that queries use too. Memory: the
    noun of every reference, one noun's visual embeddings, the vocabulary's text embeddings.

    Args:
        dead: sorted ids of deleted references; they are counted but make no prototypes.
        texts, templates: encode the nouns as queries encode class names.
    """
    nouns, starts, order = _grouped_by_noun(filtered / FILES["references"])
    embeddings = np.concatenate(
        [
            class_embeddings(texts, nouns[start : start + _NOUNS_AT_ONCE], templates)
            for start in range(0, len(nouns), _NOUNS_AT_ONCE)
        ]
    )
    alive = ~np.isin(order, dead)
    living = [order[start:stop][alive[start:stop]] for start, stop in _spans(starts)]
    live_counts = np.array([len(rows) for rows in living])
    used = [
        [noun]
        if live_counts[noun] >= config.needed
        else neighbours_of(embeddings[noun], embeddings, live_counts, config, noun)
        for noun in range(len(nouns))
    ]
    supports = [int(live_counts[of_noun].sum()) for of_noun in used]
    sizes = np.minimum(np.minimum(supports, config.max_references), config.k)
    stops = np.cumsum(sizes)

    visual = open_vectors(filtered / FILES["visual"])
    with VectorWriter(out / FILES["prototypes"], int(stops[-1]), visual.shape[1]) as writer:
        for noun, of_noun in enumerate(used):
            if sizes[noun]:
                ids = np.sort(np.concatenate([living[other] for other in of_noun]))
                rows = clustered_rows(ids, config)
                writer.append(make_prototypes(np.asarray(visual[rows], np.float32), config))
            report("prototypes", noun + 1, len(nouns))
    with TableWriter(out / FILES["nouns"], NOUN_SCHEMA) as table:
        table.append(
            {
                "noun": nouns,
                "count": np.diff(starts),
                "embedding": list(embeddings),
                "prototype_start": stops - sizes,
                "prototype_stop": stops,
                "neighbours": [
                    [nouns[other] for other in of_noun if other != noun]
                    for noun, of_noun in enumerate(used)
                ],
            }
        )
    return {
        "nouns": len(nouns),
        "rare_nouns": int((live_counts < config.needed).sum()),
        "prototypes": int(stops[-1]),
        "most_frequent": _counted(nouns, np.diff(starts), largest=True),
        "least_frequent": _counted(nouns, np.diff(starts), largest=False),
    }


def _grouped_by_noun(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The nouns, sorted; where each one's ids start in the third array; ids grouped by noun."""
    with pq.ParquetFile(path, read_dictionary=["noun"]) as file:
        column = file.read(columns=["noun"]).column("noun")
    encoded = column.combine_chunks().dictionary_encode()
    words = encoded.dictionary.to_pylist()
    in_order = sorted(range(len(words)), key=words.__getitem__)
    rank = np.empty(len(words), dtype=np.int64)
    rank[in_order] = np.arange(len(words))
    codes = rank[encoded.indices.to_numpy()]
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(len(words) + 1))
    return [words[i] for i in in_order], starts, order


def _spans(starts: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True))


def _counted(nouns: list[str], counts: np.ndarray, largest: bool, how_many: int = 20) -> list:
    """[noun, references], for the ends of the vocabulary."""
    order = np.argsort(-counts if largest else counts, kind="stable")[:how_many]
    return [[nouns[i], int(counts[i])] for i in order]
