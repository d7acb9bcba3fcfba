"""A joint space anybody understands: regions are their mean colour, words the colour they name.

Collections are real ones, published and opened, of a few noisy references of each colour.
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from ovref_inference import ReferenceCollection
from ovref_inference.collection import format as fmt
from ovref_inference.collection import index as indexes
from ovref_inference.collection import store
from ovref_inference.collection.clustering import spherical_kmeans
from ovref_inference.collection.prototypes import PrototypeConfig
from ovref_inference.encoders.pooling import pool_each
from ovref_inference.vectors import l2_normalised

COLOURS = {
    "red": (250, 20, 20),
    "crimson": (245, 25, 22),
    "green": (20, 250, 20),
    "blue": (20, 20, 250),
    "yellow": (250, 250, 20),
}
GREY = 90.0
TEMPLATES = ("a {}.", "the {} thing")


def unit(colour):
    return l2_normalised(np.asarray(colour, np.float32) - GREY)


class Texts:
    """A text is the direction of the colour it names; anything else is nearly grey."""

    def __init__(self):
        self.asked = []

    def encode(self, texts):
        self.asked.append(list(texts))
        found = [next((c for c in COLOURS if c in text), None) for text in texts]
        return np.stack([unit(COLOURS[c]) if c else unit((91, 91, 92)) for c in found])


class Regions:
    """Features of a region: its mean colour, around grey, and how often it was asked."""

    def __init__(self):
        self.calls = []

    def encode_regions(self, images, masks, heatmaps=None):
        self.calls.append((len(images), [len(m) for m in masks]))
        return [
            pool_each(image.astype(np.float32) - GREY, masks_nhw)
            for image, masks_nhw in zip(images, masks, strict=True)
        ]


def picture(label_hw, names):
    return np.array([COLOURS[name] for name in names], np.uint8)[label_hw]


def collection(folder: Path, counts: dict[str, int], *, seed=0, noise=0.1) -> ReferenceCollection:
    """Publishes and opens a collection with these numbers of references of each colour."""
    rng = np.random.default_rng(seed)
    nouns = sorted(counts)
    config = PrototypeConfig(k=2, min_references=2, neighbours=1)
    noun_of = np.repeat(np.arange(len(nouns)), [counts[noun] for noun in nouns])
    centres = np.stack([unit(COLOURS[noun]) for noun in nouns])
    visual = centres[noun_of] + noise * rng.standard_normal((len(noun_of), 3))
    visual = l2_normalised(visual).astype(np.float16)
    textual = centres[noun_of].astype(np.float16)
    prototypes = [spherical_kmeans(visual[noun_of == row], config.k) for row in range(len(nouns))]
    stops = np.cumsum([len(vectors) for vectors in prototypes])
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    n = len(noun_of)
    words = [nouns[row] for row in noun_of]
    with fmt.TableWriter(scratch / fmt.FILES["references"], fmt.REFERENCE_SCHEMA) as table:
        constant = {"x0": 0, "y0": 0, "x1": 4, "y1": 4, "area": 0.5, "score": 1.0, "seed": None}
        constant |= {"source": "test", "shard": "00000", "span_start": 2}
        table.append(
            {name: [value] * n for name, value in constant.items()}
            | {
                "id": list(range(n)),
                "key": [f"{i:024x}#0" for i in range(n)],
                "noun": words,
                "caption": [f"a {word}" for word in words],
                "span_end": [2 + len(word) for word in words],
            }
        )
    fmt.write_vectors(scratch / fmt.FILES["visual"], visual)
    fmt.write_vectors(scratch / fmt.FILES["textual"], textual)
    fmt.write_vectors(
        scratch / fmt.FILES["prototypes"], np.concatenate(prototypes).astype(np.float16)
    )
    columns = {
        "noun": nouns,
        "count": [counts[noun] for noun in nouns],
        "embedding": list(centres),
        "prototype_start": [0, *stops[:-1].tolist()],
        "prototype_stop": stops,
        "neighbours": [[] for _ in nouns],
    }
    fmt.write_table(scratch / fmt.FILES["nouns"], fmt.NOUN_SCHEMA, columns)
    fmt.write_table(
        scratch / fmt.FILES["tombstones"], fmt.TOMBSTONE_SCHEMA, fmt.tombstone_columns([], "")
    )
    for kind, vectors in (("visual", visual), ("textual", textual)):
        indexes.write_index(indexes.build_index(vectors), scratch / fmt.FILES[f"{kind}_index"])
    manifest = fmt.Manifest(
        fingerprint="0" * 64,
        visual=fmt.EncoderInfo(model="colours", revision="", dim=3),
        textual=fmt.EncoderInfo(model="words", revision="", dim=3),
        templates=TEMPLATES,
        weights=(0.9, 0.1),
        visual_index=fmt.IndexInfo(factory="Flat"),
        textual_index=fmt.IndexInfo(factory="Flat"),
        prototypes=asdict(config),
    )
    store.publish(scratch, str(folder / "collection"), manifest)
    return ReferenceCollection.open(folder / "collection")
