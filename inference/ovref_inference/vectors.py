"""Embeddings as arrays: conversion, L2 normalisation (offline and online the same), prefetching."""

import mmap
from typing import Any, Protocol

import numpy as np


class Vectors(Protocol):
    """(n, d) vectors in memory or in a file, read by slices or by arrays of row numbers."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> np.ndarray: ...


def as_float32(vectors: Any) -> np.ndarray:
    """An array or tensor as a float32 array; a tensor may have any dtype, be on any device and
    require gradients."""
    if hasattr(vectors, "detach"):
        vectors = vectors.detach().cpu().float().numpy()
    return np.asarray(vectors, dtype=np.float32)


def l2_normalised(vectors: Any) -> np.ndarray:
    """(..., d) real vectors -> (..., d) float32 of length 1.

    Args:
        vectors: array or tensor, see `as_float32`.

    Raises:
        ValueError: a vector is zero or not finite: it has no direction, and NaN in an index breaks
            every search.
    """
    vectors = as_float32(vectors)
    # Scaled by the largest entry first, so that squares neither overflow nor vanish.
    largest = np.maximum(
        vectors.max(axis=-1, keepdims=True, initial=0.0),
        -vectors.min(axis=-1, keepdims=True, initial=0.0),
    )
    bad = ~(np.isfinite(largest) & (largest > 0))
    if bad.any():
        where = np.argwhere(bad[..., 0])[0].tolist()
        raise ValueError(
            f"{int(bad.sum())} of {bad.size} vectors are zero or not finite, the first at {where}"
        )
    scaled = vectors / largest
    scaled /= np.linalg.norm(scaled, axis=-1, keepdims=True)
    return scaled


def check_readable(matrix: Vectors) -> None:
    """Raises CollectionError if the rows of a collection's matrix cannot be read in place."""
    if hasattr(matrix, "check_readable"):
        matrix.check_readable()


def prefetch_rows(matrix: Vectors, rows: np.ndarray) -> None:
    """Loads rows of a matrix in a file together, before they are read one by one.

    Otherwise each row of a memory-mapped matrix that is not in memory causes a page fault, which
    waits for the disk and also reads many neighbouring pages; here the system is asked to load the
    rows, and this returns at once. A matrix with its own `prefetch`, such as one on an object
    store, has the rows in its cache when this returns. Does nothing for a matrix in memory or on a
    platform without `madvise`.

    Args:
        matrix: (n, d), contiguous rows, as in `format.open_vectors`.
        rows: integers from 0 to n - 1, in any order, repeated or none at all.
    """
    if hasattr(matrix, "prefetch"):
        matrix.prefetch(rows)
        return
    mapping: object = matrix
    while isinstance(mapping, np.ndarray):
        mapping = mapping.base
    if not isinstance(mapping, mmap.mmap) or not hasattr(mmap, "MADV_WILLNEED"):
        return
    if not isinstance(matrix, np.ndarray) or len(rows) == 0 or matrix.size == 0:
        return
    if not matrix.flags.c_contiguous:
        return
    start = matrix.ctypes.data - np.frombuffer(mapping, dtype=np.uint8).ctypes.data
    width = matrix.strides[0]
    begins = start + np.sort(rows, axis=None).astype(np.int64) * width
    # Pages [first, last) of each row; rows whose pages meet are one range.
    firsts, lasts = begins // mmap.PAGESIZE, -(-(begins + width) // mmap.PAGESIZE)
    apart = firsts[1:] > lasts[:-1]
    firsts, lasts = firsts[np.append(True, apart)], lasts[np.append(apart, True)]
    for first, last in zip(firsts * mmap.PAGESIZE, lasts * mmap.PAGESIZE, strict=True):
        try:
            mapping.madvise(mmap.MADV_WILLNEED, first, min(last, len(mapping)) - first)
        except OSError:
            # Some file systems do not support it; the rows are read without.
            return
