"""Which partitions and which inverted lists of a partitioned collection hold the true neighbours.

    python tests/benchmarks/partitioned_lists.py --scratch SCRATCH [--most 200000 27000 6800]

For the references of reduce_million.py (128 numbers), divided into partitions of at most `--most`
references, each with inverted lists and the `nprobe` that a reduction would tune (class names of
its own nouns, held-out rows; target 0.95). Queries: 200 class names of the vocabulary, 200 names
near a class that are not in it, 200 regions. Printed for k = 10 to 350: the share of the true
neighbours in the nearest 1, 2 and 4 partitions (by mean embedding, by nearest centroid, by the
partition tree), and recall, that of the worst tenth of the queries, lists and references read if
every partition probes all of its lists, or as `joined_index.JoinedIndex` does, which compares all
centroids or finds the nearest by an index over them. A neighbour counts as found if its list is
read. Figures are in results/partitioned_lists.md.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}

import numpy as np

KS = (10, 20, 70, 150, 350)
N, NOUNS, WIDTH, QUERIES, TUNED = 200_000, 10_000, 128, 200, 400


def ranks(cosines: np.ndarray) -> np.ndarray:
    """Place of each column in its row, 0 for the highest."""
    return np.argsort(np.argsort(-cosines, axis=1), axis=1)


class Divided:
    """The inverted lists of all partitions of one kind of embedding."""

    def __init__(self, rows_nd: np.ndarray, part_n: np.ndarray) -> None:
        from ovref.reduce import ivf

        self.rows_nd, self.part_n, self.list_n = rows_nd, part_n, np.empty(len(rows_nd), np.int64)
        centroids, part_of_list = [], []
        for part in range(part_n.max() + 1):
            own = np.flatnonzero(part_n == part)
            lists = 2 ** round(np.log2(4 * np.sqrt(len(own))))
            found = ivf.train(rows_nd[own[: 39 * lists]], lists, seed=0)
            self.list_n[own] = len(part_of_list) + ivf.assign(rows_nd[own], ivf.cells_of(found))
            centroids.append(found)
            part_of_list += [part] * lists
        self.centroids, self.part_of_list = np.concatenate(centroids), np.array(part_of_list)

    def tuned(self, part: int, queries: np.ndarray, own: int) -> dict[int, int]:
        """The smallest nprobe that reaches the target at each k, within one partition."""
        from ovref_inference.collection.index import exact_search

        rows = np.flatnonzero(self.part_n == part)
        _, ids = exact_search(self.rows_nd[rows], queries, KS[-1] + own)
        lists = np.flatnonzero(self.part_of_list == part)
        place = ranks(queries @ self.centroids[lists].T)
        place = np.take_along_axis(place, self.list_n[rows[ids[:, own:]]] - lists[0], axis=1)
        found = {}
        for k in KS:
            nprobe = 1
            while True:
                recall = (place[:, :k] < nprobe).mean(axis=1)
                low = recall.mean() - 1.645 * recall.std() / len(recall) ** 0.5
                worst = np.sort(recall)[: -(-len(recall) // 10)].mean()
                if low >= 0.95 and worst >= 0.8:
                    break
                nprobe *= 2
            found[k] = nprobe
        return found


def report(label: str, read: np.ndarray, lists_of_neighbours: np.ndarray, one: Divided) -> None:
    recall = np.take_along_axis(read, lists_of_neighbours, axis=1).mean(axis=1)
    worst = np.sort(recall)[: len(recall) // 10].mean()
    sizes = np.bincount(one.list_n, minlength=len(one.centroids))
    parts = np.mean([len(np.unique(one.part_of_list[row])) for row in read])
    print(
        f"  {label}: recall {recall.mean():.3f}, worst tenth {worst:.3f}, lists "
        f"{read.sum(axis=1).mean():.0f}, references {(read * sizes).sum(axis=1).mean():.0f}, "
        f"partitions {parts:.1f}", flush=True,
    )  # fmt: skip


def from_list_index(
    one: Divided, queries: np.ndarray, nprobes: list[dict[int, int]], stored: np.ndarray
) -> dict[int, tuple[np.ndarray, float]]:
    """For each k the (queries, lists) bool that `JoinedIndex` reads by an index over the lists, and
    the share of the centroids that it compares; tuned for `stored` embeddings."""
    from ovref.reduce.list_index import index_centroids
    from ovref_inference.collection import format as fmt
    from ovref_inference.collection.index import nprobe_for, read_index
    from ovref_inference.collection.joined_index import JoinedIndex
    from ovref_inference.collection.parts import TunedIndex

    class Part:
        """What `JoinedIndex` asks of an index that is not searched."""

        index, curve = None, ()

        def __init__(self, number: int) -> None:
            self.lists = int((one.part_of_list == number).sum())

    class Counted(TunedIndex):
        def search(self, queries: np.ndarray, k: int, excluded: np.ndarray) -> object:
            share = nprobe_for(k, self.curve) / self.index.nlist
            compared.append(len(queries) * min(share, 1))
            return super().search(queries, k, excluded)

    with tempfile.TemporaryDirectory() as scratch:
        centroids, path = Path(scratch, "centroids.npy"), Path(scratch, "lists.faiss")
        fmt.write_vectors(centroids, one.centroids)
        began = time.process_time()
        info = index_centroids(centroids, stored, path, seed=0)
        print(f"list index of {len(one.centroids)}: {time.process_time() - began:.1f} CPU s, "
              f"{info.factory} {[(at.k, at.nprobe, at.recall) for at in info.curve]}")  # fmt: skip
        parts = [Part(number) for number in range(len(nprobes))]
        found = {}
        for k in KS:
            compared: list[float] = []
            counted = Counted(read_index(path), info.curve)
            need = np.array([nprobe[k] for nprobe in nprobes])
            near = JoinedIndex(parts, 1, counted)._near(queries, need)
            read = np.zeros((len(queries), len(one.centroids)), dtype=bool)
            starts = np.searchsorted(one.part_of_list, np.arange(len(parts)))
            read[near.rows, starts[near.parts] + near.lists] = True
            found[k] = read, sum(compared) / len(queries)
    return found


def nearest_partitions(
    queries: np.ndarray, one: Divided, cosines: np.ndarray, tree: object | None
) -> dict[str, np.ndarray]:
    """(queries, partitions) numbers of partitions, nearest first, by several rules."""
    parts = range(one.part_n.max() + 1)
    means = np.stack([one.rows_nd[one.part_n == part].mean(axis=0) for part in parts])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    best = np.stack([cosines[:, one.part_of_list == part].max(axis=1) for part in parts], axis=1)
    found = {"mean": queries @ means.T, "nearest centroid": best}
    if tree is not None and len(tree.children):
        beyond = np.zeros((len(queries), len(means)))
        side = queries @ tree.directions.T - tree.thresholds

        def walk(node: int, far: np.ndarray) -> None:
            if node < 0:
                beyond[:, -1 - node] = far
                return
            for child, way in zip(tree.children[node].tolist(), (1, -1), strict=True):
                walk(child, far + np.maximum(way * side[:, node], 0) ** 2)

        walk(0, np.zeros(len(queries)))
        found["tree"] = -beyond
    return {name: np.argsort(-scores, axis=1, kind="stable") for name, scores in found.items()}


def measure(folder: Path, most: int) -> None:
    from ovref.reduce.partition_tree import divide
    from ovref_inference.collection import format as fmt
    from ovref_inference.collection.index import exact_search

    rng, started = np.random.default_rng(5), time.process_time()
    texts = np.load(folder / "texts.npy")
    with fmt.open_table(folder / fmt.FILES["references"], fmt.REFERENCE_SCHEMA) as table:
        nouns = table.read(columns=["noun"]).column("noun").to_pylist()
    noun_n = np.array([int(noun.rpartition(" ")[2]) for noun in nouns])
    tree, leaf_of_noun = divide(texts, np.bincount(noun_n, minlength=NOUNS), most)
    part_n = leaf_of_noun[noun_n]
    print(f"{tree.leaves} partitions of {np.bincount(part_n).min()} to {np.bincount(part_n).max()}")
    noise = rng.standard_normal((QUERIES, WIDTH), dtype=np.float32)
    unknown = texts[rng.choice(NOUNS, QUERIES)] + 0.6 * noise
    unknown /= np.linalg.norm(unknown, axis=1, keepdims=True)
    for role in ("textual", "visual"):
        rows = np.load(folder / fmt.FILES[role]).astype(np.float32)
        one, own = Divided(rows, part_n), int(role == "visual")
        nprobes = []
        for part in range(tree.leaves):
            pool = texts[leaf_of_noun == part] if role == "textual" else rows[part_n == part]
            chosen = rng.choice(len(pool), min(TUNED, len(pool)), replace=False)
            nprobes.append(one.tuned(part, pool[chosen], own))
        print(f"{role}: nprobe {[{k: tuned[k] for k in KS} for tuned in nprobes[:2]]} ...")
        kinds = {"known names": texts[rng.choice(NOUNS, QUERIES, replace=False)],
                 "unknown names": unknown}  # fmt: skip
        if role == "visual":
            kinds = {"regions": rows[rng.choice(N, QUERIES, replace=False)]}
        for kind, queries in kinds.items():
            _, ids = exact_search(rows, queries, KS[-1] + own)
            ids, cosines = ids[:, own:], queries @ one.centroids.T
            place = np.empty(cosines.shape, np.int64)
            for part in range(tree.leaves):
                lists = np.flatnonzero(one.part_of_list == part)
                place[:, lists] = ranks(cosines[:, lists])
            stored = rows[rng.choice(N, 512)]
            by_index = from_list_index(one, queries, nprobes, stored)
            orders = nearest_partitions(queries, one, cosines, tree if not own else None)
            for k in KS:
                print(f" {kind} @{k}")
                near = part_n[ids[:, :k]]
                for name, order in orders.items():
                    shares = [
                        (near[:, :, None] == order[:, None, :count]).any(axis=2).mean()
                        for count in (1, 2, 4)
                    ]
                    print(f"  in the nearest 1, 2, 4 partitions by {name}: {np.round(shares, 3)}")
                named = place < np.array([tuned[k] for tuned in nprobes])[one.part_of_list]
                report("all lists", named, one.list_n[ids[:, :k]], one)
                home = one.part_of_list == one.part_of_list[cosines.argmax(axis=1)][:, None]
                least = np.where(named & home, cosines, np.inf).min(axis=1, keepdims=True)
                report("chosen", named & (cosines >= least), one.list_n[ids[:, :k]], one)
                read, share = by_index[k]
                label = f"chosen by the list index, {share:.3f} of the centroids compared"
                report(label, read, one.list_n[ids[:, :k]], one)
    print(f"CPU s: {time.process_time() - started:.0f}")


def main() -> None:
    from reduce_million import make

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--most", type=int, nargs="+", default=(N, 27_000, 6_800))
    arguments = parser.parse_args()
    folder = arguments.scratch / f"lists_{N}"
    if not folder.exists():
        folder.mkdir(parents=True)
        make(folder, N, NOUNS, WIDTH)
    for most in arguments.most:
        measure(folder, most)


if __name__ == "__main__":
    main()
