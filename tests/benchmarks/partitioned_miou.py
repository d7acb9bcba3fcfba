"""FOSSIL's mIoU over a collection in partitions, and without textual embeddings, against the whole.

    python tests/benchmarks/partitioned_miou.py runs/demo [--partition 300] [--scenes 200] \
        [--min-references 45]

Reduces the references of a build of the miniature undivided, in partitions, and in partitions with
textual embeddings in the index alone. Each test scene is encoded once; the prototypes of every
collection, for several seeds of k-means, are compared with the same features under the same masks
(OpenCut's), as in kmeans_starts.py. Also prints how many of the references that FOSSIL retrieves
differ from those of the undivided collection, and the bytes of each. With --min-references, nouns
that have fewer are rare, and prototypes by noun are compared too: in the undivided collection, in
partitions as they answer, and in partitions with rare nouns that borrow from the nearest nouns of
all partitions. Figures are in results/partitioned_miou.md.
"""

import argparse
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kmeans_starts import GAMMAS, clustered, encoded, labelled
from ovref.config import load_tree
from ovref.evaluation import miniature
from ovref.evaluation.cached import CachedModels
from ovref.evaluation.compare import miou_of_samples
from ovref.evaluation.methods import Methods
from ovref.evaluation.spec import EvaluateSpec
from ovref.reduce import reduce_collection
from ovref.storage.file_store import Store
from ovref_inference.collection.prototypes import Prototypes, make_prototypes, stacked
from ovref_pipelines.build_config import BuildConfig
from ovref_pipelines.output import FOLDER, build_config, open_build
from ovref_pipelines.recipe import texts_of


def make(build: str, folder: Path, most: int, rare: int | None) -> dict[str, Path]:
    """The three collections by name. Nouns with fewer references than `rare` are rare."""
    tree = build_config(Store.open(build))
    tree.pop(FOLDER, None)
    config = load_tree(BuildConfig, tree, build)
    texts, spec = texts_of(config), config.reduce
    if rare is not None:
        spec = replace(spec, prototypes=replace(spec.prototypes, min_references=rare))
    parts = replace(spec, partition_references=most)
    ways = {
        "undivided": replace(spec, partition_references=None),
        "in partitions": parts,
        "and textual ones in the index": replace(parts, textual_embeddings="in_index"),
    }
    for name, one in ways.items():
        summary = reduce_collection(
            open_build(build).step("references"), one, embed=config.embed, texts=texts,
            output=Store.open(str(folder / name)), work=folder / "work",
        )  # fmt: skip
        size = sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file())
        print(f"{name}: {summary.get('partitions', 1)} partitions, {size} bytes", flush=True)
    return {name: folder / name for name in ways}


def opened(folder: Path, scenes: int, models: CachedModels) -> tuple[Any, Any, list[Any]]:
    """FOSSIL of a collection, what answers for it, and the scenes."""
    spec = EvaluateSpec(
        collection=str(folder), output="-", split="test", scenes=scenes, rows=("fossil",)
    )
    data = spec.open_data()
    methods = Methods(spec, data, models)
    return methods.fossil(miniature.FOSSIL), methods, list(data)


def encoded_scenes(methods: Methods, examples: list[Any]) -> list[Any]:
    """Features and masks of all scenes."""
    found = []
    for start in range(0, len(examples), 32):
        methods.encode_batch(examples[start : start + 32])
        found += [encoded(methods, one.image_hwc) for one in examples[start : start + 32]]
    return found


def keys_of(collection: Any, texts: np.ndarray, n: int) -> list[set[str]]:
    """The keys of the n references that each class retrieves."""
    ids = collection.search_text(texts, n).ids
    return [{row["key"] for row in collection.rows(of_class)} for of_class in ids]


def by_noun(collection: Any, used: tuple[tuple[str, ...], ...], k: int, seed: int) -> Prototypes:
    """Prototypes of classes, each of the references of these nouns."""
    config = replace(collection.prototype_config, k=k, seed=seed)
    per_class = []
    for nouns in used:
        ids = np.sort(np.concatenate([collection.references_of(noun) for noun in nouns]))
        per_class.append(make_prototypes(np.asarray(collection.visual[ids], np.float32), config))
    vectors_nkd, counts = stacked(per_class, collection.manifest.visual.dim)
    return Prototypes(vectors_nkd=vectors_nkd, counts=counts, nouns=used)


def mious(scenes: list[Any], examples: list[Any], each: Iterable[Prototypes]) -> str:
    """mIoU of prototypes of several seeds, and its mean."""
    found = []
    for prototypes in each:
        overlaps = labelled(scenes, examples, prototypes)[GAMMAS.index(miniature.FOSSIL.gamma)]
        (miou,) = miou_of_samples(overlaps, np.ones((1, len(scenes))))
        found.append(100 * float(miou))
    return f"mIoU {[round(one, 2) for one in found]}, mean {np.mean(found):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build")
    parser.add_argument("--partition", type=int, default=300)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--min-references", type=int)
    options = parser.parse_args()
    n, k = miniature.FOSSIL.n, miniature.FOSSIL.k
    with tempfile.TemporaryDirectory() as scratch, CachedModels("cpu") as models:
        places = make(options.build, Path(scratch), options.partition, options.min_references)
        scenes: list[Any] = []
        before: list[set[str]] = []
        everywhere: tuple[tuple[str, ...], ...] = ()
        for name, folder in places.items():
            segmenter, methods, examples = opened(folder, options.scenes, models)
            scenes = scenes or encoded_scenes(methods, examples)
            collection, texts = segmenter.collection, segmenter.texts(methods.names)
            keys = keys_of(collection, texts, n)
            before = before or keys
            others = sum(len(a - b) for a, b in zip(keys, before, strict=True))
            own = collection.prototypes(methods.names, text_embeddings=texts).nouns
            everywhere = everywhere or own
            ways = {"by noun": own} if options.min_references is not None else {}
            if own != everywhere:
                ways |= {"by noun, from all partitions": everywhere}
            for clusters in (k, 1):
                seeds = range(options.seeds if clusters > 1 else 1)
                found = [clustered(segmenter, methods.names, n, clusters, 1, s)[0] for s in seeds]
                print(f"{name}, K={clusters}: {mious(scenes, examples, found)}; "
                      f"{others} of {n * len(keys)} retrieved differ", flush=True)  # fmt: skip
                for way, used in ways.items():
                    borrowing = sum(len(nouns) > 1 for nouns in used)
                    differ = sum(a != b for a, b in zip(used, everywhere, strict=True))
                    found = [by_noun(collection, used, clusters, seed) for seed in seeds]
                    print(f"{name}, {way}, K={clusters}: {mious(scenes, examples, found)}; "
                          f"{borrowing} of {len(used)} classes borrow, {differ} from other nouns",
                          flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
