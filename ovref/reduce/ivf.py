"""An inverted-file index of any size in bounded memory: train, assign in parts, merge on disk.

Codes are the stored float16 embeddings themselves, so the lists are the matrix in another order:
faiss trains and searches, and only each row's list has to be computed. Training and assignment have
two levels, cells of centroids first, which costs about a tenth of comparing with every centroid. A
row may end up in its second-best list; `nprobe`, which is tuned on the finished index, compensates.

Rows are processed in blocks of `BLOCK` counted from row 0, because a matrix product may round a row
differently in a different batch. So the same rows give the same index in any number of parts, and a
grown collection has the same index as one built at once.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovref.reduce.rows import Rows
from ovref_inference.collection.exact import faiss_module

BLOCK = 32_768
"""Rows assigned to lists in one matrix product."""
CELLS_PROBED = 4
"""Cells searched for the nearest centroid of a row."""
_COARSE_PER_CELL = 256
"""Training rows per cell on the first level; also the most that faiss uses."""


@dataclass(frozen=True)
class Cells:
    """Centroids, sorted by cell."""

    centres: np.ndarray
    """(cells, d) float32."""
    centroids: np.ndarray
    """(lists, d) float32, grouped by cell."""
    numbers: np.ndarray
    """(lists,) int64: the list number of each centroid."""
    starts: np.ndarray
    """(cells + 1,) int64: index of each cell's first centroid."""


def cells_of(centroids: np.ndarray) -> Cells:
    """Groups n centroids into about sqrt(n) cells. Deterministic."""
    count = max(1, 2 ** round(np.log2(np.sqrt(len(centroids)))))
    centres = _kmeans(centroids, count, seed=0)
    owner = (centroids @ centres.T).argmax(axis=1)
    numbers = np.argsort(owner, kind="stable")
    starts = np.searchsorted(owner[numbers], np.arange(count + 1))
    return Cells(centres, np.ascontiguousarray(centroids[numbers]), numbers, starts)


def assign(vectors: np.ndarray, cells: Cells) -> np.ndarray:
    """Assigns (n, d) float32 vectors to lists: (n,) int64, by the nearest centroid in the
    nearest cells."""
    probed = min(CELLS_PROBED, len(cells.centres))
    nearest = np.argpartition(vectors @ cells.centres.T, -probed, axis=1)[:, -probed:]
    looks = np.zeros((len(cells.centres), len(vectors)), dtype=bool)
    looks[nearest.T, np.arange(len(vectors))] = True
    best = np.full(len(vectors), -np.inf, dtype=np.float32)
    found = np.zeros(len(vectors), dtype=np.int64)
    for cell, (start, stop) in enumerate(zip(cells.starts[:-1], cells.starts[1:], strict=True)):
        rows = np.flatnonzero(looks[cell])
        if start == stop or not len(rows):
            continue
        similarity = vectors[rows] @ cells.centroids[start:stop].T
        closest = similarity.argmax(axis=1)
        score = similarity[np.arange(len(rows)), closest]
        better = score > best[rows]
        best[rows[better]] = score[better]
        found[rows[better]] = cells.numbers[start + closest[better]]
    return found


def train(sample: np.ndarray, lists: int, *, seed: int) -> np.ndarray:
    """Trains (lists, d) float32 centroids by cosine on a (t, d) float32 sample.

    On GPUs, if faiss can use them, plain k-means over all centroids. Otherwise k-means into cells,
    then k-means within each cell, whose share of the centroids is proportional to its rows.
    """
    if gpus():
        return _kmeans_on_gpus(sample, lists, seed)
    cells = max(1, 2 ** round(np.log2(np.sqrt(lists))))
    few = np.random.default_rng(seed).permutation(len(sample))[: cells * _COARSE_PER_CELL]
    centres = _kmeans(sample[np.sort(few)], cells, seed)
    owner = np.concatenate(
        [
            (sample[at : at + BLOCK] @ centres.T).argmax(axis=1)
            for at in range(0, len(sample), BLOCK)
        ]
    )
    sizes = np.bincount(owner, minlength=cells)
    shares = np.diff(np.cumsum(sizes) * lists // len(sample), prepend=0)
    parts = [
        _kmeans(sample[owner == cell], int(shares[cell]), seed)
        for cell in range(cells)
        if shares[cell]
    ]
    return np.concatenate(parts)


def gpus() -> int:
    """Number of GPUs that this build of faiss can use."""
    return faiss_module().get_num_gpus()


def empty_index(factory: str, centroids: np.ndarray, ranges: np.ndarray | None = None) -> Any:
    """A trained faiss index without entries, whose codes are the vectors in float16, or in 8 bits.

    Args:
        ranges: (2, d) the lowest and the highest number of each dimension, for 8-bit codes.
    """
    faiss = faiss_module()
    index = faiss.index_factory(centroids.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    index.by_residual = False
    index.quantizer.add(np.ascontiguousarray(centroids))
    # float16 codes need no training; 8-bit codes learn their ranges.
    index.train(np.ascontiguousarray(centroids if ranges is None else ranges))
    return index


def centroids_of(index: Any) -> np.ndarray:
    """The (lists, d) float32 centroids of a trained index."""
    return index.quantizer.reconstruct_n(0, index.nlist)


@dataclass(frozen=True)
class Part:
    """The entries of some rows, sorted by list: raw codes, ids, and the size of each list."""

    codes: Path
    ids: Path
    sizes: np.ndarray
    """(lists,) int64."""


def write_part(vectors: Path, cells: Cells, start: int, stop: int, out: Path) -> Part:
    """Assigns rows [start, stop) to lists and writes `<out>.*`; a block begins at `start`."""
    rows = Rows(vectors)
    halves = rows[start:stop]
    owner = np.concatenate(
        [
            assign(halves[at : at + BLOCK].astype(np.float32), cells)
            for at in range(0, stop - start, BLOCK)
        ]
    )
    order = np.argsort(owner, kind="stable")
    part = Part(
        out.with_suffix(".codes"),
        out.with_suffix(".ids"),
        np.bincount(owner, minlength=len(cells.numbers)),
    )
    with open(part.codes, "wb") as file:
        for at in range(0, len(order), BLOCK):
            halves[order[at : at + BLOCK]].tofile(file)
    (order + start).astype("<i8").tofile(part.ids)
    np.save(out.with_suffix(".sizes.npy"), part.sizes, allow_pickle=False)
    return part


def read_part(out: Path) -> Part:
    """The part that `write_part` wrote at `out`."""
    sizes = np.load(out.with_suffix(".sizes.npy"), allow_pickle=False)
    return Part(out.with_suffix(".codes"), out.with_suffix(".ids"), sizes)


def part_of_index(path: Path, rows: int, out: Path) -> Part:
    """Writes the entries with ids below `rows` of an index made by `merge` as a part at `out`."""
    faiss = faiss_module()
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    lists = index.invlists
    sizes = np.zeros(index.nlist, dtype=np.int64)
    part = Part(out.with_suffix(".codes"), out.with_suffix(".ids"), sizes)
    with open(part.codes, "wb") as codes, open(part.ids, "wb") as ids:
        for number in range(index.nlist):
            size = lists.list_size(number)
            if not size:
                continue
            found: np.ndarray = faiss.rev_swig_ptr(lists.get_ids(number), size)
            kept = int(np.searchsorted(found, rows))  # ids ascend within a list
            sizes[number] = kept
            if kept:
                ids.write(found[:kept].tobytes())
                pointer = lists.get_codes(number)
                codes.write(faiss.rev_swig_ptr(pointer, kept * index.code_size).tobytes())
    np.save(out.with_suffix(".sizes.npy"), sizes, allow_pickle=False)
    return part


def merge(index: Any, parts: Sequence[Part], path: Path) -> None:
    """Writes the empty `index` with the entries of `parts`, one list at a time.

    The file equals what `faiss.write_index` would write had all been added in memory. Parts must be
    in ascending order of ids.
    """
    faiss = faiss_module()
    sizes = np.stack([part.sizes for part in parts]).sum(axis=0, dtype=np.int64)
    index.ntotal = int(sizes.sum())
    header = faiss.serialize_index(index).tobytes()
    # An index without entries ends in: fourcc, lists, code size, "sprs" and no (list, size) pairs.
    empty = b"ilar" + _u64(index.nlist) + _u64(index.code_size) + b"sprs" + _u64(0)
    if not header.endswith(empty):
        raise RuntimeError(
            "this version of faiss writes inverted lists in a format that ovref does not know"
        )
    offsets = [np.cumsum(part.sizes) - part.sizes for part in parts]
    files = [(os.open(part.codes, os.O_RDONLY), os.open(part.ids, os.O_RDONLY)) for part in parts]
    try:
        with open(path, "wb") as out:
            out.write(header.removesuffix(empty))
            out.write(b"ilar" + _u64(index.nlist) + _u64(index.code_size))
            filled = np.flatnonzero(sizes)
            if len(filled) > index.nlist // 2:
                out.write(b"full" + _u64(len(sizes)) + sizes.astype("<u8").tobytes())
            else:
                pairs = np.stack([filled, sizes[filled]], axis=1).astype("<u8")
                out.write(b"sprs" + _u64(pairs.size) + pairs.tobytes())
            for number in filled:
                for kind, width in ((0, index.code_size), (1, 8)):
                    for part, descriptors, starts in zip(parts, files, offsets, strict=True):
                        count = int(part.sizes[number]) * width
                        at = int(starts[number]) * width
                        out.write(os.pread(descriptors[kind], count, at))
    finally:
        for pair in files:
            for descriptor in pair:
                os.close(descriptor)


def _u64(value: int) -> bytes:
    return int(value).to_bytes(8, "little")


def _kmeans(vectors: np.ndarray, count: int, seed: int, steps: int = 10) -> np.ndarray:
    """(count, d) centroids by cosine of (n, d) vectors, with faiss on the CPU; n may be < count."""
    faiss = faiss_module()
    if len(vectors) <= count:
        rest = vectors[np.arange(count - len(vectors)) % len(vectors)]
        return np.concatenate([vectors, rest]).astype(np.float32)
    kmeans = faiss.Kmeans(
        vectors.shape[1], count, niter=steps, seed=seed, spherical=True,
        min_points_per_centroid=1, max_points_per_centroid=len(vectors),
    )  # fmt: skip
    kmeans.train(np.ascontiguousarray(vectors, dtype=np.float32))
    return kmeans.centroids


def _kmeans_on_gpus(sample: np.ndarray, lists: int, seed: int) -> np.ndarray:
    faiss = faiss_module()
    clustering = faiss.Clustering(sample.shape[1], lists)
    clustering.spherical, clustering.seed, clustering.niter = True, seed, 10
    clustering.max_points_per_centroid = len(sample)
    index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(sample.shape[1]))
    clustering.train(np.ascontiguousarray(sample), index)
    return faiss.vector_to_array(clustering.centroids).reshape(lists, -1)
