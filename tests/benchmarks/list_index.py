"""The index over the inverted lists of many partitions: making it, and finding lists by it.

    python tests/benchmarks/list_index.py --scratch SCRATCH [--partitions 100] [--lists 4096]

Draws centroids as references are drawn in reduce_million.py (nouns in topics, eight ways to look),
but for noise that has `--dimensions` of them, as real embeddings have far fewer than 768, and a
quarter of it, as means of some references have. Queries are drawn with the whole noise. Prints CPU
seconds and memory of making the index; then, for searches in which each partition names `nprobe`
lists, which of the lists that comparing with all centroids chooses are chosen by the index, and
what is read in place by eight queries and by eight others after them: requests, megabytes, CPU.
Figures are in results/partitioned_lists.md.
"""

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

from machine import resident_mb

os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}

import numpy as np

WIDTH, QUERIES, BLOCK = 768, 512, 65_536
NPROBES = (4, 16, 64)


def draw(nouns: int, dimensions: int) -> object:
    """Returns a function that draws (n, WIDTH) float32 vectors, given a generator, n and the share
    of the noise."""
    from ovref_inference.vectors import l2_normalised

    rng = np.random.default_rng(0)
    topics = rng.standard_normal((max(1, nouns // 50), WIDTH), dtype=np.float32)
    looks = topics[rng.integers(len(topics), size=nouns)]
    looks += 0.8 * rng.standard_normal((nouns, WIDTH), dtype=np.float32)
    modes = rng.standard_normal((4096, WIDTH), dtype=np.float32)
    plane = rng.standard_normal((dimensions, WIDTH), dtype=np.float32) / dimensions**0.5
    weights = 1 / (np.arange(nouns) + 30)
    weights /= weights.sum()

    def drawn(rng: np.random.Generator, count: int, share: float) -> np.ndarray:
        of = rng.choice(nouns, size=count, p=weights)
        look = (of * 8 + rng.integers(8, size=count)) * 2654435761 % len(modes)
        x = looks[of] + 0.7 * modes[look]
        noise = rng.standard_normal((count, dimensions), dtype=np.float32) @ plane
        return l2_normalised(x + 0.9 * share * noise)

    return drawn


class Part:
    """What `JoinedIndex` asks of an index that is not searched."""

    index, curve = None, ()

    def __init__(self, lists: int) -> None:
        self.lists = lists


def comparing(path: Path, queries: np.ndarray, lists: int, nprobe: int) -> list[np.ndarray]:
    """The numbers of the lists that each query is looked for in, nearest first, by the rule of
    `JoinedIndex` over the cosines of all."""
    rows = np.load(path, mmap_mode="r")
    cosines = np.concatenate([
        queries @ rows[at : at + BLOCK].astype(np.float32).T for at in range(0, len(rows), BLOCK)
    ], axis=1)  # fmt: skip
    found = []
    for one in cosines:
        each = one.reshape(-1, lists)
        home = int(each.max(axis=1).argmax())
        near = -np.partition(-each, nprobe - 1, axis=1)[:, nprobe - 1]
        chosen = np.flatnonzero((each >= np.maximum(near, near[home])[:, None]).ravel())
        found.append(chosen[np.argsort(-one[chosen], kind="stable")])
    return found


def main() -> None:
    from fsspec.implementations.local import LocalFileSystem

    from ovref.reduce.list_index import index_centroids
    from ovref_inference.collection import format as fmt
    from ovref_inference.collection.joined_index import JoinedIndex
    from ovref_inference.collection.parts import TunedIndex
    from ovref_inference.collection.remote import SMALL_BLOCK_BYTES, BlockCache, RemoteFile
    from ovref_inference.collection.remote_index import RemoteIndex

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--partitions", type=int, default=100)
    parser.add_argument("--lists", type=int, default=4096)
    parser.add_argument("--nouns", type=int, default=100_000)
    parser.add_argument("--dimensions", type=int, default=64)
    given = parser.parse_args()
    total = given.partitions * given.lists
    drawn = draw(given.nouns, given.dimensions)
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        centroids, path = Path(scratch, "centroids.npy"), Path(scratch, "lists.faiss")
        with fmt.VectorWriter(centroids, total, WIDTH) as writer:
            for at in range(0, total, BLOCK):
                rng = np.random.default_rng([1, at])
                writer.append(drawn(rng, min(BLOCK, total - at), 0.25))
        stored, queries = (drawn(np.random.default_rng(seed), QUERIES, 1.0) for seed in (2, 3))
        began, before = time.process_time(), resident_mb()
        info = index_centroids(centroids, stored, path, seed=0)
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        spent, size = time.process_time() - began, path.stat().st_size
        print(f"{total} lists: {info.factory}, {spent:.0f} CPU s, {highest:.0f} MB at most "
              f"({before:.0f} before), {size / 1e6:.0f} MB of file")  # fmt: skip
        print([(at.k, at.nprobe, at.recall, at.worst_tenth) for at in info.curve], flush=True)

        class Counted(LocalFileSystem):
            requests = sent = 0

            def cat_file(self, path: str, start: int, end: int, **options: object) -> bytes:
                Counted.requests, Counted.sent = Counted.requests + 1, Counted.sent + end - start
                return super().cat_file(path, start, end, **options)

        parts = [Part(given.lists)] * given.partitions
        for nprobe in NPROBES:
            cache = BlockCache(Path(scratch, f"blocks{nprobe}"))
            file = RemoteFile(
                Counted(skip_instance_cache=True), str(path), size, "0" * 64, cache,
                SMALL_BLOCK_BYTES,
            )
            index = TunedIndex(RemoteIndex(file, total, WIDTH, info.factory), info.curve)
            joined, need = JoinedIndex(parts, 16, index), np.full(given.partitions, nprobe)
            near, line = [], []
            for start in (0, 8):
                Counted.requests = Counted.sent = 0
                began = time.process_time()
                near.append(joined._near(queries[start : start + 8], need))
                line.append(f"{Counted.requests} requests, {Counted.sent / 1e6:.1f} MB, "
                            f"{(time.process_time() - began) * 1000 / 8:.0f} ms")  # fmt: skip
            after = resident_mb()
            some = queries[:64]
            near = joined._near(some, need)
            expected = comparing(centroids, some, given.lists, nprobe)
            numbers = near.parts * given.lists + near.lists
            shares, nearest = [], []
            for row, wanted in enumerate(expected):
                own = numbers[near.rows == row]
                shares.append(np.isin(wanted, own).mean())
                nearest.append(np.isin(wanted[:nprobe], own).mean())
            print(f"nprobe {nprobe}: {np.mean([len(one) for one in expected]):.0f} lists by "
                  f"comparing all, {len(numbers) / len(some):.0f} by the index, which finds "
                  f"{np.mean(shares):.4f} of them (worst tenth {np.sort(shares)[:6].mean():.4f}), "
                  f"{np.mean(nearest):.4f} of the nearest {nprobe}; first {line[0]}; then "
                  f"{line[1]}; resident {after:.0f} MB", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
