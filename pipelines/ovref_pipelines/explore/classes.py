"""How well a collection covers a list of classes."""

from typing import Any

import numpy as np

from ovref.errors import InputError
from ovref_inference import ReferenceCollection
from ovref_inference.collection.class_support import MEANINGLESS, class_support

MOST = 2000
"""Classes in one list."""
FEW = 10
"""Fewer references than this are few."""


def class_names(text: str) -> list[str]:
    """The classes of a pasted list: one a line, or with commas between them; each once.

    Raises:
        InputError: there is none, or more than `MOST`.
    """
    lines = text.splitlines() if "\n" in text.strip() else text.split(",")
    stripped = (line.strip(" ,\t\r\n") for line in lines)
    names = list(dict.fromkeys(name for name in stripped if name))
    if not 1 <= len(names) <= MOST:
        raise InputError(f"give 1 to {MOST} classes, one a line, found {len(names)}")
    return names


def coverage(collection: ReferenceCollection, names: list[str]) -> list[dict[str, Any]]:
    """For each class what stands for it, the least covered first.

    Classes that are no noun of the vocabulary are compared with it by the collection's own text
    encoder, which is loaded for the first of them.

    Raises:
        ModelError: that encoder cannot be loaded.
    """
    counts = dict(zip(collection.nouns, collection.noun_counts.tolist(), strict=True))
    unknown = [name for name in names if not counts.get(name.strip().lower())]
    embeddings_cd = np.zeros((len(names), collection.manifest.textual.dim), np.float32)
    if unknown:
        places = [names.index(name) for name in unknown]
        embeddings_cd[places] = collection.embed_text(unknown)
    found = class_support(
        collection, names, embeddings_cd, meaningless=lambda: collection.embed_text(MEANINGLESS)
    )
    rows = []
    for name, support in zip(names, found, strict=True):
        noun = support.nouns[0] if support.nouns else None
        count = 0 if noun is None or support.source == "none" else counts[noun]
        verdict = support.source if support.source != "own" or count >= FEW else "few"
        rows.append({
            "name": name, "verdict": verdict, "noun": noun, "count": count,
            "cosine": round(support.cosine, 3),
        })  # fmt: skip
    worst = {"none": 0, "borrowed": 1, "few": 2, "own": 3}
    return sorted(rows, key=lambda row: (worst[row["verdict"]], row["count"], row["name"]))
