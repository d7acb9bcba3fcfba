"""A small collection of random but clustered references, published as a real one is."""

import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from ovref_inference.collection import format as fmt
from ovref_inference.collection import index as indexes
from ovref_inference.collection import store
from ovref_inference.collection.prototypes import PrototypeConfig, make_prototypes, neighbours_of
from ovref_inference.vectors import l2_normalised

# Helper modules of these tests, which are imported by their plain names.
sys.path.insert(0, str(Path(__file__).parent))

COUNTS = {"boat": 40, "cat": 30, "dog": 25, "lion": 3, "tree": 20}
D_VISUAL, D_TEXTUAL = 16, 12


class Built:
    """What went into a collection, for comparison with what comes out."""

    def __init__(self, counts: dict[str, int] = COUNTS, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.nouns = sorted(counts)
        self.counts = np.array([counts[noun] for noun in self.nouns])
        self.config = PrototypeConfig(k=4, min_references=8, neighbours=2)
        centres = l2_normalised(rng.standard_normal((len(self.nouns), D_VISUAL)))
        self.noun_embeddings = l2_normalised(rng.standard_normal((len(self.nouns), D_TEXTUAL)))
        if {"cat", "lion"} <= set(self.nouns):
            # The rare noun is close to one of the others in text space.
            near = self.noun_embeddings[self.nouns.index("cat")]
            row = self.nouns.index("lion")
            self.noun_embeddings[row] = l2_normalised(near + 0.2 * self.noun_embeddings[row])
        self.noun_of = rng.permutation(np.repeat(np.arange(len(self.nouns)), self.counts))
        noise = rng.standard_normal((len(self.noun_of), D_VISUAL))
        self.visual = l2_normalised(centres[self.noun_of] + 0.1 * noise).astype(np.float16)
        noise = rng.standard_normal((len(self.noun_of), D_TEXTUAL))
        textual = self.noun_embeddings[self.noun_of] + 0.05 * noise
        self.textual = l2_normalised(textual).astype(np.float16)
        self.prototypes = self._prototypes()

    def _prototypes(self) -> list[tuple[np.ndarray, list[int]]]:
        found = []
        for row, count in enumerate(self.counts):
            used = [row]
            if count < self.config.needed:
                used = neighbours_of(
                    self.noun_embeddings[row], self.noun_embeddings, self.counts, self.config, row
                )
            vectors = self.visual[np.isin(self.noun_of, used)]
            found.append((make_prototypes(vectors, self.config).astype(np.float16), used))
        return found

    def references(self) -> dict[str, list]:
        n = len(self.noun_of)
        words = [self.nouns[i] for i in self.noun_of]
        return {
            "id": list(range(n)),
            "key": [f"{i:024x}#0" for i in range(n)],
            "noun": words,
            "caption": [f"a {word} number {i}" for i, word in enumerate(words)],
            "span_start": [2] * n,
            "span_end": [2 + len(word) for word in words],
            "x0": [0] * n,
            "y0": [1] * n,
            "x1": [10] * n,
            "y1": [11] * n,
            "area": [0.25] * n,
            "score": [0.5] * n,
            "source": ["daam"] * n,
            "shard": [f"{i // 50:05d}" for i in range(n)],
            "seed": [i if i % 2 else None for i in range(n)],
        }

    def manifest(self) -> fmt.Manifest:
        return fmt.Manifest(
            fingerprint="0" * 64,
            visual=fmt.EncoderInfo(model="test-visual", revision="", dim=D_VISUAL),
            textual=fmt.EncoderInfo(model="test-textual", revision="", dim=D_TEXTUAL),
            templates=("a {}.",),
            weights=(0.9, 0.1),
            visual_index=fmt.IndexInfo(factory="Flat"),
            textual_index=fmt.IndexInfo(factory="Flat"),
            prototypes=asdict(self.config),
            licences=("CC-BY-4.0",),
        )

    def write(self, folder: Path) -> Path:
        """All files but collection.json."""
        folder.mkdir(parents=True, exist_ok=True)
        with fmt.TableWriter(folder / fmt.FILES["references"], fmt.REFERENCE_SCHEMA) as table:
            table.append(self.references())
        fmt.write_vectors(folder / fmt.FILES["visual"], self.visual)
        fmt.write_vectors(folder / fmt.FILES["textual"], self.textual)
        fmt.write_vectors(
            folder / fmt.FILES["prototypes"], np.concatenate([p for p, _ in self.prototypes])
        )
        stops = np.cumsum([len(p) for p, _ in self.prototypes])
        nouns = {
            "noun": self.nouns,
            "count": self.counts,
            "embedding": list(self.noun_embeddings),
            "prototype_start": [0, *stops[:-1].tolist()],
            "prototype_stop": stops,
            "neighbours": [[self.nouns[i] for i in used[1:]] for _, used in self.prototypes],
        }
        fmt.write_table(folder / fmt.FILES["nouns"], fmt.NOUN_SCHEMA, nouns)
        fmt.write_table(
            folder / fmt.FILES["tombstones"], fmt.TOMBSTONE_SCHEMA, fmt.tombstone_columns([], "")
        )
        for kind in ("visual", "textual"):
            index = indexes.build_index(getattr(self, kind))
            indexes.write_index(index, folder / fmt.FILES[f"{kind}_index"])
        return folder

    def publish(self, scratch: Path, url: str) -> fmt.Manifest:
        return store.publish(self.write(scratch), url, self.manifest())


@pytest.fixture(scope="session")
def built() -> Built:
    return Built()


@pytest.fixture
def published(built: Built, tmp_path: Path) -> Path:
    """A freshly published local collection that a test may damage."""
    folder = tmp_path / "collection"
    built.publish(tmp_path / "scratch", str(folder))
    return folder
