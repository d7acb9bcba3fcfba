"""How many neighbours of rare nouns share their partition, for the nouns of COCO's captions.

    python tests/benchmarks/rare_nouns.py --data ../shared/data

Nouns are embedded by the miniature's CLIP and, since that knows 27 of them, also by the captions
they occur in (singular vectors of positive pointwise mutual information), and divided as a
reduction divides them, each counted a hundred times at most. For nouns with fewer than ten mentions
the ten nearest nouns of all are compared with the ten nearest of the same part. Prints the table of
results/partitioned_miou.md.
"""

import argparse
from collections import Counter
from pathlib import Path

import faiss
import numpy as np
import scipy.sparse
from scipy.sparse.linalg import svds

from ovref.corpora import CorpusSpec, read_captions
from ovref.models.tagger import MINIATURE
from ovref.records import Caption, Prompt
from ovref.reduce.partition_tree import divide
from ovref.stages.extract_nouns import ExtractNouns
from ovref_inference.collection.retrieve import class_embeddings
from ovref_inference.encoders import TextEncoderConfig, load_text_encoder
from ovref_inference.vectors import l2_normalised

NEIGHBOURS, RARE, MOST, WIDTH = 10, 10, 100, 128


def nouns_of_captions(path: Path) -> list[list[str]]:
    """The nouns of each caption, once each."""
    captions = (
        one for one in read_captions(CorpusSpec(path=str(path))) if isinstance(one, Caption)
    )
    answers = ExtractNouns(tagger=MINIATURE).build()(captions)
    return [sorted({n.text for n in one.nouns}) for one in answers if isinstance(one, Prompt)]


def by_clip(nouns: list[str]) -> np.ndarray:
    """(nouns, d) float32."""
    clip = load_text_encoder(TextEncoderConfig(model="miniature:clip"))
    some = (nouns[start : start + 64] for start in range(0, len(nouns), 64))
    return np.concatenate([class_embeddings(clip, one, ("a photo of a {}.",)) for one in some])


def by_captions(nouns: list[str], captions: list[list[str]], counts: np.ndarray) -> np.ndarray:
    """(nouns, WIDTH) float32; nouns that are alone in their captions all get the same row."""
    row = {noun: at for at, noun in enumerate(nouns)}
    rows = np.array([row[noun] for one in captions for noun in one])
    columns = np.repeat(np.arange(len(captions)), [len(one) for one in captions])
    occurs = scipy.sparse.csr_matrix((np.ones(len(rows)), (rows, columns)))
    pairs = (occurs @ occurs.T).tocoo()
    a, b, together = (v[pairs.row != pairs.col] for v in (pairs.row, pairs.col, pairs.data))
    information = np.maximum(np.log(together * len(captions) / (counts[a] * counts[b])), 0)
    matrix = scipy.sparse.csr_matrix((information, (a, b)), shape=pairs.shape)
    vectors, values, _ = svds(matrix, k=WIDTH, random_state=0)
    vectors = vectors * np.sqrt(values)
    vectors[np.linalg.norm(vectors, axis=1) < 1e-6] = 1.0
    return l2_normalised(vectors.astype(np.float32))


def nearest(rows: np.ndarray, among: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, ...]:
    """Cosines and numbers of the nearest NEIGHBOURS of each row, itself left out."""
    cosines, found = faiss.knn(
        vectors[rows], vectors[among], min(NEIGHBOURS + 1, len(among)),
        metric=faiss.METRIC_INNER_PRODUCT,
    )  # fmt: skip
    found = among[found]
    found[:, 0] = np.where((found == rows[:, None]).any(1), found[:, 0], rows)  # ties: any will do
    others = np.argsort(found == rows[:, None], axis=1, kind="stable")[:, : found.shape[1] - 1]
    return np.take_along_axis(cosines, others, 1), np.take_along_axis(found, others, 1)


def compared(vectors: np.ndarray, counts: np.ndarray, leaf: np.ndarray) -> str:
    """Cells of a row of the table."""
    rare = np.flatnonzero(counts < RARE)
    cosines, wanted = nearest(rare, np.arange(len(counts)), vectors)
    is_kept = leaf[wanted] == leaf[rare][:, None]
    inside, replacing = [], []
    for part in np.unique(leaf[rare]):
        some = np.flatnonzero(leaf[rare] == part)
        among = np.flatnonzero(leaf == part)
        if len(among) > 1:
            own, found = nearest(rare[some], among, vectors)
            inside.append(own.ravel())
            replacing.append(own[~(found[:, :, None] == wanted[some][:, None]).any(2)])
    cells = (
        f"{100 * is_kept[:, 0].mean():.0f}%", f"{100 * is_kept.mean():.0f}%",
        f"{cosines.mean():.3f}", f"{np.concatenate(inside).mean():.3f}",
        f"{cosines[~is_kept].mean():.3f}", f"{np.concatenate(replacing).mean():.3f}",
    )  # fmt: skip
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    captions = nouns_of_captions(parser.parse_args().data / "coco" / "captions_val2017.json")
    found = Counter(noun for one in captions for noun in one)
    nouns = sorted(found)
    counts = np.array([found[noun] for noun in nouns])
    print(f"{len(captions)} captions, {len(nouns)} nouns, {(counts < RARE).sum()} rare")
    weights = np.minimum(counts, MOST)
    embedded = {"CLIP": by_clip(nouns), "captions": by_captions(nouns, captions, counts)}
    for name, vectors in embedded.items():
        between = (vectors[::4] @ vectors[::4].T)[np.triu_indices(len(vectors[::4]), 1)]
        print(f"{name}: median cosine of two nouns {np.median(between):.3f}")
        for parts in (4, 16, 64):
            tree, leaf = divide(vectors, weights, int(np.ceil(1.02 * weights.sum() / parts)))
            print(f"| {name} | {tree.leaves} | {compared(vectors, counts, leaf)} |", flush=True)


if __name__ == "__main__":
    main()
